"""Where a model's parameters and bytes are, what its cache will cost, and what each format would make of it."""

from __future__ import annotations

import shlex

import streamlit as st

from app import engine, format, state
from app.components import model_parts as parts
from app.components.error_card import error_card
from app.components.heading import About, Reproduction, heading
from app.components.waiting import settled
from app.reproduce import SCRIPTS, with_constants
from app.text import esc
from core.errors import SlimscopeError

ABOUT = About(
    "Every parameter belongs to one component: embedding, attention, MLP, router, experts, norms or head. A tensor "
    "that serves twice (a tied embedding) is counted once.\n\n"
    "While it writes, a decoder keeps the keys and values of every earlier token; layers with a sliding window stop "
    "growing there. G is the number of key/value heads and K the dimension of a head.\n\n"
    "The sizes per storage format are computed from the shapes, scales included, before anything is made; after a "
    "compression they are compared with the real file.",
    formula=r"\text{cache bytes} = 2 \cdot b \cdot G \cdot K \sum_{\text{layers}} \min(\text{context}, \text{window})",
    paper="https://arxiv.org/abs/2305.13245",
)

source = state.model()
try:
    opening = engine.open_model(source)
except SlimscopeError as error:
    heading("Model", about=ABOUT)
    error_card(error, key="model_source")
    st.stop()
top = st.container()
card = settled(opening, key="open")
if card is None:
    top.title(esc(f"Opening {state.model_name(source)}"), anchor=False)
    st.stop()

script = with_constants((SCRIPTS / "model_sizes.py").read_text(encoding="utf-8"), {"MODEL": card.folder})
with top:
    heading(
        f"{state.model_name(source)}: {format.count(card.parameters)} parameters in {format.size(card.bytes)}",
        about=ABOUT,
        reproduce=Reproduction(script, shlex.join(["slimscope", "open", source])),
    )
parts.facts(card)
left, right = st.columns([6, 4], gap="small")
with left:
    with st.container(border=True):
        parts.components(card)
    with st.container(border=True):
        parts.modules(card)
with right:
    with st.container(border=True):
        parts.formats(card)
    with st.container(border=True):
        parts.kv_cache(card)
for note in card.notes:
    st.caption(esc(note))
st.caption(
    esc(parts.verified(card)),
    help="Identities that the model's anatomy must satisfy, checked at every opening",
)
