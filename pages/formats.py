"""Number formats: what one can hold, and what it would make of the opened model's weights."""

from __future__ import annotations

import streamlit as st

from app import questions, state
from app.components import number_parts as parts
from app.components.desk import desk
from app.components.heading import About, Reproduction, heading
from app.components.opening import opened
from app.reproduce import SCRIPTS, with_constants

ABOUT = About(
    "A float is a sign, an exponent that says which power of two, and a mantissa that cuts the way to the next power "
    "into equal steps: its relative error is the same everywhere, until its smallest exponent, below which numbers "
    "(subnormal) lose digits. An integer has equal steps everywhere: its relative error grows towards zero.\n\n"
    "Narrow formats share a scale among a block of weights. The block's largest magnitude sets it, so one large weight "
    "takes resolution from its neighbours: type a larger one and watch the number move.\n\n"
    "Everything here is computed as this program stores it; the second half asks the same of the opened model.",
    formula=r"x = (-1)^{s} \cdot 2^{\,e - \text{bias}} \cdot 1.m \cdot \text{scale}",
    paper="https://arxiv.org/abs/2310.10537",
)
HALVES = {"number": "A number", "weights": "The weights of the model"}

if "probe" in st.query_params and "part" not in st.query_params:
    st.query_params["part"] = "weights"
half = state.choice(
    st.segmented_control,
    "Look at",
    HALVES,
    key="part",
    default="number",
    required=True,
    label_visibility="collapsed",
)
top = st.container()
if half == "weights":
    seen = opened("formats", top)
    with top:
        desk(
            questions.of_page("formats"),
            seen.source,
            seen.card,
            seen.run,
            first=questions.FIRST["formats"],
            hide_unread=True,
        )
    st.stop()

asked = parts.question()
if asked is None:
    top.title("What can a number hold?", anchor=False)
    st.stop()
constants = {"NUMBER": asked.number, "LARGEST": asked.largest, "RULE": asked.rule}
with top:
    heading(
        "What can a number hold?",
        about=ABOUT,
        reproduce=Reproduction(
            with_constants((SCRIPTS / "number_formats.py").read_text(encoding="utf-8"), constants),
            'python -c "from core.numerics.catalogue import FORMATS, store; '
            f"print(store({asked.number!r}, FORMATS['{asked.format.id}'], largest={asked.largest!r}, "
            f"rule='{asked.rule}'))\"",
        ),
    )
left, right = st.columns([13, 7], gap="small")
with left:
    parts.every_format(asked)
with right:
    parts.one_format(asked)
parts.line(asked)
left, right = st.columns(2, gap="small")
with left:
    parts.curves(asked)
with right:
    parts.all_formats(asked)
parts.table(asked)
