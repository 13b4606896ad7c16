"""The maps and pictures of a Result: words in cells or a canvas, with a colour to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import streamlit as st

from app import format, state
from app.arrangement import Group, Look, axes_of
from app.charts import MARK_LIMIT, chart, titled
from app.components.export_menu import export_menu
from app.components.heat_canvas import Cell, heat_canvas
from app.components.image_map import image_map
from app.components.result_drawer import Cells, choose_settings
from app.components.token_grid import token_grid
from app.text import esc
from app.views import Grid, boxes, hover_lines, thinned, to_grid
from core.registry import Settings
from core.types import Result, View

FEW_CELLS = 600
"""A map that is only read shows its words up to so many cells; a larger one is a picture."""
WIDEST_CELL = 80
"""Pixels of a column at most, so that a map of two columns is no poster."""


def chooser(result: Result, group: Group, settings: Settings, *, key: str, look: Look) -> None:
    """A map that sets two settings of the form: the overview one picks a head from."""
    view, grid = _map_card_head(result, group, key, look)
    assert view.y
    at = grid.index(str(getattr(settings, view.y)), str(getattr(settings, view.x)))

    axes = axes_of(group)

    def choose(cell: Cell) -> None:
        choose_settings(result.provenance.method, dict(zip(axes, grid.keys(cell.row, cell.col), strict=True)))

    _draw_map(grid, view, key, Cell(*at) if at else None, choose, look)


def plain_map(result: Result, group: Group, *, key: str, look: Look) -> None:
    """A map to read by hovering, without a drawer."""
    with st.container(border=True):
        view, grid = _map_card_head(result, group, key, look)
        _draw_map(grid, view, key, None, None, look)


def cell_map(cells: Cells, group: Group, *, key: str, look: Look) -> None:
    """A heat map with its colour to choose; its cells open the drawer."""
    with st.container(border=True):
        view, grid = _map_card_head(cells.result, group, key, look)
        keys = cells.picked(group)
        at = grid.index(*map(str, keys)) if keys else None

        def pick(cell: Cell) -> None:
            cells.pick(group, *grid.keys(cell.row, cell.col))

        _draw_map(grid, view, key, Cell(*at) if at else None, pick, look)


def picture(cells: Cells, group: Group, *, key: str, look: Look) -> None:
    """Patch weights over the picture they are of; a patch opens the drawer."""
    view = group[0]
    assert view.y
    assert view.color
    frame = cells.result.frames[view.frame].reset_index(drop=True)
    keys = cells.picked(group)
    at = frame.index[(frame[view.y] == keys[0]) & (frame[view.x] == keys[1])].tolist() if keys else []

    def pick(index: int) -> None:
        cells.pick(group, frame[view.y][index], frame[view.x][index])

    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.header(esc(view.title), anchor=False, width="stretch")
            export_menu(frame, chart(thinned(frame), replace(view, kind="heatmap")), name=key, key=key)
        image_map(
            cells.result.images[view.frame],
            boxes(frame, view, cells.result.images[view.frame]),
            frame[view.color].astype(float).tolist(),
            key=f"{key}_picture",
            label=view.title,
            hover=hover_lines(frame, view),
            unit=titled(view.color, view),
            selected=at[0] if at else None,
            on_pick=pick,
            midpoint=view.midpoint,
            limits=look.of(view, view.color),
        )


def _map_card_head(result: Result, group: Group, key: str, look: Look) -> tuple[View, Grid]:
    """Title, colour choice and export of a map; returns the chosen view and its matrix."""
    view = group[0]
    with st.container(horizontal=True, vertical_alignment="center"):
        title = st.container(width="stretch")
        export = st.container(width="content")
    if len(group) > 1:
        view = _colour(group, key, look)
    title.header(esc(view.title), anchor=False)
    frame = result.frames[view.frame]
    with export:
        export_menu(frame, chart(thinned(frame), view), name=key, key=key)
    return view, to_grid(frame, view)


def _colour(group: Group, key: str, look: Look) -> View:
    """The colour that is chosen; a panel that follows another shows that one's choice."""
    by_column = {str(view.color): view for view in group}
    titles = {column: titled(column, view) for column, view in by_column.items()}
    default = str(group[0].color)
    few = len(group) <= 3
    widget: Any = st.segmented_control if few else st.selectbox
    options: dict[str, Any] = {"label_visibility": "collapsed", **({"required": True} if few else {})}
    if not look.leader:
        return by_column[
            state.choice(widget, "Colour", titles, key=f"{key}_colour", default=default, **options)
        ]
    chosen = st.session_state.get(f"{look.leader}_{key.rpartition('_')[2]}_colour") or default
    st.session_state[f"{key}_colour"] = chosen
    widget("Colour", list(titles), format_func=titles.get, key=f"{key}_colour", disabled=True, **options)
    return by_column[chosen]


def _draw_map(
    grid: Grid,
    view: View,
    key: str,
    selected: Cell | None,
    on_pick: Callable[[Cell], None] | None,
    look: Look,
) -> None:
    """Words in cells where the view has them and they fit; a canvas otherwise."""
    assert view.y
    assert view.color
    unit = titled(view.color, view)
    limits = look.of(view, view.color)
    most = FEW_CELLS if on_pick is None else MARK_LIMIT
    if view.text and grid.values_RC.size <= most:
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
            on_pick=on_pick or (lambda _: None),
            midpoint=view.midpoint,
            log=view.log,
            limits=limits,
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
        limits=limits,
        selected=selected,
        on_pick=on_pick,
        max_width=min(640, WIDEST_CELL * grid.values_RC.shape[1]),
    )
