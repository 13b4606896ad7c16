"""Two models, one probe, one input: what changed first, then where, then both results side by side on one scale."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app import engine, state
from app import format as fmt
from app.arrangement import Look, arrange
from app.comparing import FIRST, SECOND, difference, metric_table, shared_limits
from app.components.result_drawer import Cells, drawer
from app.components.result_maps import cell_map
from app.components.result_panel import result_panel, tokens_card
from app.text import esc
from core.models.sizes import ModelCard
from core.registry import Settings
from core.types import Result

NONE = "none"


def compare_picker(source: str, card: ModelCard) -> str | None:
    """Draw the choice of a second model, variants of the same base first; None while there is none."""
    base = engine.base_of(source, card.fingerprint)
    titles = {NONE: "nothing"} | engine.relatives(base, engine.revision()) | state.known_models()
    titles.pop(source, None)
    chosen = state.choice(
        st.selectbox,
        "Compare with",
        titles,
        key="compare",
        default=NONE,
        accept_new_options=True,
        help="Another model or variant on the same input, side by side; variants of the same base come first",
    )
    return None if chosen in (NONE, source) else chosen


def reference_picker(source: str, card: ModelCard) -> str | None:
    """Draw the choice of the original that a compressed copy is held against: a variant's own base unless changed."""
    base = engine.base_of(source, card.fingerprint)
    relatives = engine.relatives(base, engine.revision())
    titles = {NONE: "nothing"} | relatives | state.known_models()
    titles.pop(source, None)
    own = next(iter(relatives), NONE)
    chosen = state.choice(
        st.selectbox,
        "Original",
        titles,
        key="reference",
        default=own if own in titles else NONE,
        accept_new_options=True,
        help="The model that this one was compressed from; both read the same input",
    )
    return None if chosen in (NONE, source) else chosen


def compare_panel(
    first: Result, second: Result, *, names: tuple[str, str], name: str, settings: Settings
) -> None:
    """Draw both results with what differs; ``names`` are the models', ``name`` begins widget keys."""
    _metrics(first, second, names)
    made = difference(first, second)
    for sentence in made.words:
        st.markdown(f":material/info: :gray[{esc(sentence)}]")
    if made.result.views:
        _where(made.result, names, f"{name}_difference")
    limits = shared_limits(first, second)
    for column, result, title, key in zip(
        st.columns(2, gap="small"), (first, second), names, (name, f"{name}_b"), strict=True
    ):
        with column:
            st.header(esc(title), anchor=False)
            leader = name if key != name else ""
            look = Look(narrow=True, limits=limits, leader=leader, metrics=False)
            result_panel(result, name=key, settings=settings, look=look)


def _metrics(first: Result, second: Result, names: tuple[str, str]) -> None:
    table = metric_table(first, second)
    if table.empty:
        return
    units = table["unit"].tolist()
    shown = pd.DataFrame({"": table["metric"].map(fmt.label)})
    for column, title in ((FIRST, names[0]), (SECOND, names[1]), ("difference", "Difference")):
        shown[title] = [fmt.number(v, u) for v, u in zip(table[column], units, strict=True)]
    with st.container(border=True):
        st.header("What changed", anchor=False)
        st.dataframe(
            shown, hide_index=True, height="content", key="compare_metrics", alt="Both models' numbers"
        )


def _where(result: Result, names: tuple[str, str], key: str) -> None:
    """The difference maps, second minus first, with a drawer of their own for both values."""
    st.caption(esc(f"Differences are {names[1]} minus {names[0]}."))
    cells = Cells(result, arrange(result, None))
    look = Look()
    groups = cells.arrangement.maps
    for number, view in enumerate(cells.arrangement.tokens):
        tokens_card(cells, view, f"{key}_tokens{number}", look)
    if not groups:
        return
    left, right = st.columns([7, 3], gap="small")
    with left:
        for number, group in enumerate(groups):
            cell_map(cells, group, key=f"{key}_map{number}", look=look)
    with right.container(border=True, key=f"{key}_drawer"):
        drawer(cells, key=f"{key}_cell")
