"""The maps of a Result: words in cells or a canvas, a colour to choose, and the drawer of the picked cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app import format, state
from app.charts import MARK_LIMIT, chart, titled
from app.components.export_menu import export_menu
from app.components.heat_canvas import Cell, heat_canvas
from app.components.result_table import result_table
from app.components.token_grid import token_grid
from app.text import esc, visible
from app.views import Grid, cell_rows, is_detail, thinned, to_grid, trajectory
from core.registry import Settings
from core.types import Result, View


def chooses(group: tuple[View, ...], settings: Settings) -> bool:
    """Whether the axes of a group of maps are settings of the method, so that a click can set them."""
    return {group[0].x, group[0].y} <= set(type(settings).model_fields)


def chooser(result: Result, group: tuple[View, ...], settings: Settings, *, key: str) -> None:
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


def plain_map(result: Result, group: tuple[View, ...], *, key: str) -> None:
    """A map to read by hovering, without a drawer."""
    with st.container(border=True):
        view, grid = _map_card_head(result, group, key)
        _draw_map(grid, view, key, None, None)


def cell_map(result: Result, group: tuple[View, ...], *, key: str) -> None:
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
        result_table(rows[shown], detail, key=f"{key}_{detail.frame}", height="content")
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


def _fact(value: object) -> str:
    """One number of a cell; a token keeps its own characters."""
    return format.number(float(value)) if isinstance(value, float | np.floating) else visible(str(value))
