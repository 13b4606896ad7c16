"""A Result, drawn: headline numbers, the tokens, maps with the picked cell beside them, charts, and provenance.

It knows kinds of views, never methods: a new probe needs nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from app import format, state
from app.charts import chart
from app.components.card_head import card_head
from app.components.result_maps import cell_map, chooser, chooses, plain_map
from app.components.result_table import result_table
from app.components.token_strip import token_strip
from app.text import esc
from app.views import hover_lines, is_detail, map_groups, provenance_line, thinned
from core.registry import Settings
from core.types import Metric, Result, View


def result_panel(result: Result, *, name: str, settings: Settings) -> None:
    """Draw a whole result; ``name`` begins widget keys and names files, ``settings`` are what it was made with.

    A map whose two axes are settings (layer and head) chooses them: a click sets the form and runs again.
    """
    metric_row(result.metrics)
    for flag in result.flags:
        st.badge(esc(format.label(flag)), icon=":material/flag:", color="orange")
    groups = map_groups(result.views)
    for view in result.views:
        if view.kind == "tokens":
            _tokens(result, view, groups, name)
    choosing = [group for group in groups if chooses(group, settings)]
    others = [group for group in groups if group not in choosing]
    for number, group in enumerate(choosing):
        left, right = st.columns([4, 6], gap="small")
        with left.container(border=True, height="stretch"):
            chooser(result, group, settings, key=f"{name}_choice{number}")
        with right:
            while others:
                plain_map(result, others.pop(0), key=f"{name}_chosen{len(others)}")
    for number, group in enumerate(others):
        cell_map(result, group, key=f"{name}_map{number}")
    drawn = {id(view) for group in groups for view in result.views if view in group or is_detail(view, group)}
    _charts(result, [v for v in result.views if v.kind != "tokens" and id(v) not in drawn], name)
    for note in result.notes:
        st.caption(esc(note))
    st.caption(esc(provenance_line(result.provenance)), help=esc(result.provenance.exactness_check) or None)


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


def _tokens(result: Result, view: View, groups: list[tuple[View, ...]], name: str) -> None:
    """A strip of tokens; where a map has the same columns, a click picks that column on it."""
    assert view.text
    assert view.color
    frame = result.frames[view.frame].sort_values(view.x)
    columns = frame[view.x].tolist()
    follows = next((group[0] for group in groups if group[0].x == view.x), None)
    picked = state.picked_cell()
    chosen = next((i for i, key in enumerate(columns) if picked and str(key) == picked[1]), None)

    def on_pick(index: int) -> None:
        row = picked[0] if picked else ""
        if follows is not None and not picked:
            row = result.frames[follows.frame][follows.y].max()
        state.pick_cell(row, columns[index])

    with st.container(border=True):
        card_head(view.title, frame, chart(thinned(frame), view), key=f"{name}_tokens")
        token_strip(
            frame[view.text].astype(str).tolist(),
            frame[view.color].astype(float).tolist(),
            key=f"{name}_strip_{view.color}",
            label=view.title,
            hover=hover_lines(frame, view),
            selected=chosen,
            on_pick=on_pick,
            midpoint=view.midpoint,
        )


def _reading_order(view: View) -> list[str]:
    """A table's columns: where it is, what it says, then the numbers."""
    return list(dict.fromkeys([view.x, *([view.text] if view.text else []), *view.columns]))


def _charts(result: Result, views: Sequence[View], name: str) -> None:
    """Charts and tables that are not maps, two to a row."""
    if not views:
        return
    grid = st.grid(2 if len(views) > 1 else 1, min_column_width=360)
    for number, view in enumerate(views):
        key = f"{name}_{view.kind}{number}"
        frame = result.frames[view.frame]
        with grid.container(border=True, height="stretch"):
            drawn = None if view.kind == "table" else chart(thinned(frame), view)
            card_head(view.title, frame, drawn, key=key)
            if drawn is None:
                result_table(
                    frame[_reading_order(view)], view, key=key, height=320 if len(frame) > 8 else "content"
                )
            else:
                st.altair_chart(drawn, key=f"{key}_chart", alt=view.title)
