"""A Result, drawn: how exact it is, headline numbers, the ranked table, tokens, pictures, maps and one drawer, charts.

It knows kinds of views, never methods: a new probe needs nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import streamlit as st

from app import format, state
from app.arrangement import Arrangement, Look, arrange, axes_of
from app.charts import chart
from app.components.card_head import card_head
from app.components.result_charts import charts
from app.components.result_drawer import Cells, choose_settings, drawer
from app.components.result_maps import cell_map, chooser, picture, plain_map
from app.components.result_table import result_table
from app.components.token_strip import token_strip
from app.text import esc
from app.views import hover_lines, provenance_line, thinned
from core.registry import Settings
from core.types import Metric, Provenance, Result, View

ALONE = Look()
TOLERABLE_GAP = 1e-3
"""An identity missed by more is said in orange."""


def result_panel(result: Result, *, name: str, settings: Settings | None, look: Look = ALONE) -> None:
    """Draw a whole result; ``name`` begins widget keys and names files, ``settings`` are what it was made with.

    A map whose two axes are settings (layer and head) chooses them: a click sets the form and runs again.
    """
    trust_row(result)
    if look.metrics:
        metric_row(result.metrics)
    arrangement = arrange(result, settings)
    cells = Cells(result, arrangement)
    if settings is not None and arrangement.choosing:
        _tables_and_tokens(cells, name, look)
        _chosen(cells, settings, name, look)
    elif arrangement.cells:
        beside = not look.narrow
        left, right = st.columns([7, 3], gap="small") if beside else (st.container(), st.container())
        with left:
            _tables_and_tokens(cells, name, look)
            for number, group in enumerate(arrangement.pictures):
                picture(cells, group, key=f"{name}_image{number}", look=look)
            for number, group in enumerate(arrangement.maps):
                cell_map(cells, group, key=f"{name}_map{number}", look=look)
        with right.container(border=True, key=f"{name}_drawer"):
            drawer(cells, key=f"{name}_cell")
    else:
        _tables_and_tokens(cells, name, look)
    charts(cells, name, look)
    for note in result.notes:
        st.caption(esc(note))
    st.caption(esc(provenance_line(result.provenance)), help=esc(result.provenance.exactness_check) or None)


def trust_row(result: Result) -> None:
    """Whether the numbers can be believed: how far an identity is missed, and every flag, before any of them."""
    badges = [f":orange-badge[:material/flag: {esc(format.label(flag))}]" for flag in result.flags]
    gap = exactness_badge(result.provenance)
    if gap or badges:
        st.markdown(
            " ".join([*([gap] if gap else []), *badges]), help=esc(result.provenance.exactness_check) or None
        )


def exactness_badge(provenance: Provenance) -> str:
    """The exactness gap as a Markdown badge: green where it is rounding, orange where it is more."""
    gap = provenance.exactness_gap
    if gap is None:
        return ""
    color = "green" if gap <= TOLERABLE_GAP else "orange"
    words = "exact, gap 0" if gap == 0 else f"exactness gap {gap:.1e}"
    return f":{color}-badge[:material/verified: {esc(words)}]"


def metric_row(metrics: Sequence[Metric]) -> None:
    """One card per headline number: value with unit, and beneath it the interval or the count it rests on."""
    if not metrics:
        return
    grid = st.grid(4, min_column_width=170)
    for metric in metrics:
        beneath = format.interval(metric.low, metric.high, metric.unit)
        if beneath == format.NONE:
            beneath = f"n = {metric.n:,}" if metric.n else " "
        grid.metric(
            format.label(metric.name),
            format.number(metric.value, metric.unit),
            delta=beneath,
            delta_color="off",
            delta_arrow="off",
            help=esc(metric.interval) if metric.interval else None,
            border=True,
            height="stretch",
        )


def _tables_and_tokens(cells: Cells, name: str, look: Look) -> None:
    """What comes before the maps: the ranking that answers the question, then the prompt."""
    for number, view in enumerate(cells.arrangement.lead):
        _ranking(cells, view, key=f"{name}_lead{number}")
    for number, view in enumerate(cells.arrangement.tokens):
        tokens_card(cells, view, f"{name}_tokens{number or ''}", look)


def _chosen(cells: Cells, settings: Settings, name: str, look: Look) -> None:
    """The overviews that choose, beside the maps of what was chosen."""
    arrangement: Arrangement = cells.arrangement
    maps = list(enumerate(arrangement.maps))
    for number, group in enumerate(arrangement.choosing):
        columns: Any = st.columns([4, 6], gap="small") if not look.narrow else (st.container(), nullcontext())
        with columns[0].container(border=True, height="stretch"):
            chooser(cells.result, group, settings, key=f"{name}_choice{number}", look=look)
        with columns[1]:
            while maps and number == len(arrangement.choosing) - 1:
                at, chosen = maps.pop(0)
                plain_map(cells.result, chosen, key=f"{name}_map{at}", look=look)


def _ranking(cells: Cells, view: View, *, key: str) -> None:
    frame = cells.result.frames[view.frame]
    with st.container(border=True):
        card_head(view.title, frame, None, key=key)
        result_table(frame, view, key=key, on_row=cells.on_row(view))


def tokens_card(cells: Cells, view: View, key: str, look: Look) -> None:
    """A strip of tokens; where a map has the same columns, a click picks that column on it."""
    assert view.text
    assert view.color
    result = cells.result
    frame = result.frames[view.frame].sort_values(view.x)
    columns = frame[view.x].tolist()
    follows = next((group for group in cells.arrangement.maps if group[0].x == view.x), None)
    picked = state.picked_cell()
    chosen = next((i for i, at in enumerate(columns) if picked and str(at) == picked.col), None)

    chooses = any(axes_of(group)[1] == view.x for group in cells.arrangement.choosing)

    def on_pick(index: int) -> None:
        if chooses:  # the column is a setting: the token that is followed
            choose_settings(result.provenance.method, {view.x: columns[index]})
        elif follows is not None and not cells.arrangement.choosing:
            cells.pick_column(follows, columns[index])

    with st.container(border=True):
        card_head(view.title, frame, chart(thinned(frame), view), key=key)
        token_strip(
            frame[view.text].astype(str).tolist(),
            frame[view.color].astype(float).tolist(),
            key=f"{key}_strip",
            label=view.title,
            hover=hover_lines(frame, view),
            selected=chosen,
            on_pick=on_pick,
            midpoint=view.midpoint,
            limits=look.of(view, view.color),
            nominal=format.label(view.color) if view.nominal else "",
        )
