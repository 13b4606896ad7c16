"""The charts and further tables of a Result, two to a row; a scatter's axes can be chosen, a mark can be clicked."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import streamlit as st

from app import state
from app.arrangement import Look
from app.charts import PICK, chart, titled
from app.components.card_head import card_head
from app.components.result_drawer import Cells
from app.components.result_table import result_table
from app.views import measures, thinned
from core.types import View

CLICKABLE = ("scatter", "bar")


def charts(cells: Cells, name: str, look: Look) -> None:
    """Draw the views that are no maps; a click on a mark or row that is a cell of a map picks that."""
    views = cells.arrangement.rest
    if not views:
        return
    columns = 2 if len(views) > 1 and not look.narrow else 1
    grid = st.grid(columns, min_column_width=360)
    for number, view in enumerate(views):
        with grid.container(border=True, height="stretch"):
            _one(cells, view, f"{name}_{view.kind}{number}", look)


def _one(cells: Cells, view: View, key: str, look: Look) -> None:
    frame, on_row = cells.result.frames[view.frame], cells.on_row(view)
    if view.kind == "table":
        card_head(view.title, frame, None, key=key)
        result_table(frame, view, key=key, on_row=on_row)
        return
    head = st.container()
    if view.kind == "scatter" and not look.narrow:
        view = _with_chosen_axes(frame, view, key)
    limits = {column: ends for (name, column), ends in look.limits.items() if name == view.frame}
    drawn = chart(thinned(frame), view, limits=limits)
    with head:
        card_head(view.title, frame, drawn, key=key)
    if on_row is None or view.kind not in CLICKABLE:
        st.altair_chart(drawn, key=f"{key}_chart", alt=view.title)
        return

    def picked() -> None:
        points = st.session_state[f"{key}_chart"]["selection"].get(PICK) or []
        if points and set(on_row.columns) <= set(points[0]):
            on_row(points[0])

    clickable = chart(thinned(frame), view, limits=limits, pick=on_row.columns)
    st.altair_chart(clickable, key=f"{key}_chart", alt=view.title, on_select=picked)


def _with_chosen_axes(frame: pd.DataFrame, view: View, key: str) -> View:
    """A scatter over any two of its frame's measures; the first choice is the view's own."""
    assert view.y
    titles = {column: titled(column, view) for column in measures(frame, view)}
    if len(titles) < 3:
        return view
    with st.container(horizontal=True, gap="small"):
        x = state.choice(st.selectbox, "Across", titles, key=f"{key}_x", default=view.x)
        y = state.choice(st.selectbox, "Up", titles, key=f"{key}_y", default=view.y)
    if (x, y) == (view.x, view.y):
        return view
    tooltip = tuple(dict.fromkeys([view.x, view.y, *view.tooltip]))
    return replace(view, x=x, y=y, unit=view.unit if y == view.y else "", log=False, tooltip=tooltip)
