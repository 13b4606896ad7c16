"""A Result, drawn: headline numbers, the tokens, maps with the picked cell beside them, charts, and provenance.

It knows kinds of views, never methods: a new probe needs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import streamlit as st
from pandas.api.types import is_float_dtype

from app import format, state
from app.charts import MARK_LIMIT, chart, titled
from app.components.export_menu import export_menu
from app.components.heat_canvas import Cell, heat_canvas
from app.components.token_grid import token_grid
from app.components.token_strip import token_strip
from app.text import esc, visible
from app.views import (
    Grid,
    cell_rows,
    hover_lines,
    is_detail,
    map_groups,
    provenance_line,
    thinned,
    to_grid,
    trajectory,
)
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
    choosers = [group for group in groups if _chooses(group, settings)]
    others = [group for group in groups if group not in choosers]
    for number, chooser in enumerate(choosers):
        left, right = st.columns([4, 6], gap="small")
        with left.container(border=True, height="stretch"):
            _chooser(result, chooser, settings, f"{name}_choice{number}")
        with right:
            while others:
                _plain_map(result, others.pop(0), f"{name}_chosen{len(others)}")
    for number, group in enumerate(others):
        _map(result, group, f"{name}_map{number}")
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
        with st.container(horizontal=True, vertical_alignment="center"):
            st.header(esc(view.title), anchor=False, width="stretch")
            export_menu(frame, chart(thinned(frame), view), name=f"{name}_tokens", key=f"{name}_tokens")
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


def _chooses(group: tuple[View, ...], settings: Settings) -> bool:
    return {group[0].x, group[0].y} <= set(type(settings).model_fields)


def _chooser(result: Result, group: tuple[View, ...], settings: Settings, key: str) -> None:
    """A map that sets two settings of the form: the overview one picks a head from."""
    view, grid = _map_card_head(result, group, key)
    assert view.y
    at = grid.index(str(getattr(settings, view.y)), str(getattr(settings, view.x)))
    prefix = result.provenance.method

    def choose(cell: Cell) -> None:
        row_key, col_key = grid.keys(cell.row, cell.col)
        st.session_state[f"{prefix}_{view.y}"], st.session_state[f"{prefix}_{view.x}"] = row_key, col_key

    _draw_map(grid, view, key, Cell(*at) if at else None, choose)


def _map_card_head(result: Result, group: tuple[View, ...], key: str) -> tuple[View, Grid]:
    """Title, colour choice and export of a map; returns the chosen view and its matrix."""
    view = group[0]
    with st.container(horizontal=True, vertical_alignment="center"):
        title = st.container(width="stretch")
        export = st.container(width="content")
    if len(group) > 1:
        view = _colour(group, key)
    title.header(esc(view.title), anchor=False)
    frame = result.frames[view.frame]
    with export:
        export_menu(frame, chart(thinned(frame), view), name=key, key=key)
    return view, to_grid(frame, view)


def _plain_map(result: Result, group: tuple[View, ...], key: str) -> None:
    """A map to read by hovering, without a drawer."""
    with st.container(border=True):
        view, grid = _map_card_head(result, group, key)
        _draw_map(grid, view, key, None, None)


def _map(result: Result, group: tuple[View, ...], key: str) -> None:
    """A heat map with its colour to choose, and the picked cell's detail beside it."""
    details = [candidate for candidate in result.views if is_detail(candidate, group)]
    left, right = st.columns([7, 3], gap="small")
    with left.container(border=True):
        view, grid = _map_card_head(result, group, key)
        picked = state.picked_cell()
        at = grid.index(*picked) if picked else None
        _draw_map(
            grid,
            view,
            key,
            Cell(*at) if at else None,
            lambda cell: state.pick_cell(*grid.keys(cell.row, cell.col)),
        )
    with right.container(border=True, height="stretch"):
        if at is None:
            st.header("One cell", anchor=False)
            st.markdown(":material/ads_click: :gray[Click a cell to see it in detail.]")
        else:
            _detail(result, view, details, grid, at, key)


def _colour(group: tuple[View, ...], key: str) -> View:
    by_column = {str(view.color): view for view in group}
    few = len(group) <= 3
    widget: Any = st.segmented_control if few else st.selectbox
    column = state.choice(
        widget,
        "Colour",
        {column: titled(column, view) for column, view in by_column.items()},
        key=f"{key}_colour",
        default=str(group[0].color),
        label_visibility="collapsed",
        **({"required": True} if few else {}),
    )
    return by_column[column]


def _draw_map(
    grid: Grid, view: View, key: str, selected: Cell | None, on_pick: Callable[[Cell], None] | None
) -> None:
    """Words in cells where the view has them and they fit; a canvas otherwise."""
    assert view.y
    assert view.color
    unit = titled(view.color, view)
    if view.text and on_pick is not None and grid.values_RC.size <= MARK_LIMIT:
        token_grid(
            grid.words,
            grid.values_RC,
            key=f"{key}_grid",
            label=view.title,
            corner=format.label(view.y),
            rows=grid.rows,
            cols=grid.cols,
            hover=grid.hover,
            unit=unit,
            selected=selected,
            on_pick=on_pick,
            midpoint=view.midpoint,
            log=view.log,
        )
        return
    heat_canvas(
        grid.values_RC[None],
        key=f"{key}_canvas",
        label=view.title,
        titles=[f"{format.label(view.y)} ↓  {format.label(view.x)} →"],
        axes=(format.label(view.y), view.x.replace("_", " ")),
        rows=grid.rows,
        cols=grid.cols,
        unit=unit,
        midpoint=view.midpoint,
        log=view.log,
        selected=selected,
        on_pick=on_pick,
        max_width=640,
    )


def _detail(
    result: Result, view: View, details: list[View], grid: Grid, at: tuple[int, int], key: str
) -> None:
    """Everything known about one cell: its values, its tables, and its column from top to bottom."""
    assert view.y
    assert view.color
    row_key, col_key = grid.keys(*at)
    with st.container(horizontal=True, vertical_alignment="center"):
        place = f"{format.label(view.y)} {grid.rows[at[0]]}, {view.x} {grid.cols[at[1]]}"
        st.header(esc(place), anchor=False, width="stretch")
        st.button(
            "Clear", icon=":material/close:", type="tertiary", on_click=state.clear_cell, key=f"{key}_clear"
        )
    for detail in details:
        rows = cell_rows(result.frames[detail.frame], detail, row_key, col_key)
        shown = [column for column in detail.columns if column not in (view.x, view.y)]
        table(rows[shown], detail, key=f"{key}_{detail.frame}", height="content")
    frame = result.frames[view.frame]
    path = View("line", x=view.y, y=view.color, unit=view.unit, log=False, tooltip=view.tooltip)
    st.caption(
        esc(f"{titled(view.color, view)} along {format.label(view.y).lower()}s, {view.x} {grid.cols[at[1]]}")
    )
    column = trajectory(frame, view, col_key)
    st.altair_chart(
        chart(column, path).properties(height=180),
        key=f"{key}_path",
        alt=f"{titled(view.color, view)} at every {view.y} for one {view.x}",
    )
    cell = cell_rows(frame, view, row_key, col_key).iloc[0]
    facts = {titled(str(name), view): _fact(value) for name, value in cell[list(view.tooltip)].items()}
    st.dataframe(
        pd.DataFrame({"": facts.keys(), "value": facts.values()}),
        hide_index=True,
        height="content",
        alt="Every number of this cell",
    )


def _reading_order(view: View) -> list[str]:
    """A table's columns: where it is, what it says, then the numbers."""
    return list(dict.fromkeys([view.x, *([view.text] if view.text else []), *view.columns]))


def _fact(value: object) -> str:
    """One number of a cell; a token keeps its own characters."""
    return format.number(float(value)) if isinstance(value, float | np.floating) else visible(str(value))


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
            with st.container(horizontal=True, vertical_alignment="center"):
                st.header(esc(view.title), anchor=False, width="stretch")
                export_menu(frame, drawn, name=key, key=key)
            if drawn is None:
                table(frame[_reading_order(view)], view, key=key, height=320 if len(frame) > 8 else "content")
            else:
                st.altair_chart(drawn, key=f"{key}_chart", alt=view.title)


def table(frame: pd.DataFrame, view: View, *, key: str, height: int | Literal["content"] = 320) -> None:
    """A frame as a table with headers in words and numbers to four digits."""
    config = {
        column: st.column_config.NumberColumn(titled(column, view), format="%.4g")
        if is_float_dtype(frame[column])
        else st.column_config.Column(titled(column, view))
        for column in frame.columns
    }
    st.dataframe(
        frame, hide_index=True, column_config=config, key=key, height=height, alt=view.title or "Values"
    )
