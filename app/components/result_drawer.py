"""The one detail drawer of a result: everything known about the cell that was clicked, wherever it was clicked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
from pandas.api.types import is_numeric_dtype

from app import format, state
from app.arrangement import Arrangement, Group, axes_of
from app.charts import chart, titled
from app.components.result_table import result_table
from app.text import esc, visible
from app.views import axis_names, cell_rows, display_names, thinned, trajectory
from core.types import Result, View


@dataclass(frozen=True)
class Cells:
    """The cells of one result: which is picked, and how one is picked."""

    result: Result
    arrangement: Arrangement

    def tag(self, group: Group) -> str:
        """What the address says of the axes; nothing where all maps have the same."""
        axes = {axes_of(g) for g in self.arrangement.cells}
        return ".".join(axes_of(group)) if len(axes) > 1 else ""

    def pick(self, group: Group, row_key: object, col_key: object) -> None:
        """Put a cell of a map into the address."""
        state.pick_cell(row_key, col_key, self.tag(group))

    def keys_in(self, group: Group, row_key: object, col_key: object) -> tuple[object, object] | None:
        """A map's own keys for a cell that another frame names, where 4 may be 4.0; None where it has no such cell."""
        y, x = axes_of(group)
        frame = self.result.frames[group[0].frame]
        found = frame[(frame[y] == row_key) & (frame[x] == col_key)]
        return (found[y].iloc[0], found[x].iloc[0]) if len(found) else None

    def picked(self, group: Group) -> tuple[object, object] | None:
        """The keys of the picked cell, if it is one of this map's (or picture's)."""
        picked = state.picked_cell()
        if picked is None or picked.axes not in ("", self.tag(group)):
            return None
        y, x = axes_of(group)
        frame = self.result.frames[group[0].frame]
        found = frame[(frame[y].astype(str) == picked.row) & (frame[x].astype(str) == picked.col)]
        return (found[y].iloc[0], found[x].iloc[0]) if len(found) else None

    def pick_column(self, group: Group, col_key: object) -> None:
        """Pick a whole column's cell: in the row that is picked already, else in the last one."""
        y, _ = axes_of(group)
        now = self.picked(group)
        self.pick(group, now[0] if now else self.result.frames[group[0].frame][y].max(), col_key)

    def on_row(self, view: View) -> RowPick | None:
        """What a click on a row of a view's frame picks; None where rows are neither cells nor columns of a map."""
        columns = set(self.result.frames[view.frame].columns)
        target = self.arrangement.target(columns)
        if target is None:
            target = next((group for group in self.arrangement.cells if axes_of(group)[1] in columns), None)
        return None if target is None else RowPick(self, target, columns)

    def chosen(self) -> tuple[Group, tuple[object, object]] | None:
        """The first map that has the picked cell, and the cell's keys."""
        for group in self.arrangement.cells:
            keys = self.picked(group)
            if keys is not None:
                return group, keys
        return None


@dataclass(frozen=True)
class RowPick:
    """What a click on a row of a table, or on a mark of a chart, does: it picks the map's cell that the row is about."""

    cells: Cells
    target: Group
    known: set[str]
    """Columns of the frame that rows come from."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row that name the cell; one alone names a column of the map."""
        return tuple(axis for axis in axes_of(self.target) if axis in self.known)

    def __call__(self, row: Mapping[str, Any] | pd.Series) -> None:
        """Pick the row's cell: open it in the drawer, or set the form where the map's axes are settings."""
        y, x = axes_of(self.target)
        if y not in self.known:
            self.cells.pick_column(self.target, row[x])
            return
        keys = self.cells.keys_in(self.target, row[y], row[x])
        if keys is None:  # a row about something else, such as an MLP in a ranking of heads and MLPs
            return
        if self.target in self.cells.arrangement.choosing:
            choose_settings(self.cells.result.provenance.method, dict(zip((y, x), keys, strict=True)))
        else:
            self.cells.pick(self.target, *keys)


def choose_settings(method: str, values: Mapping[str, Any]) -> None:
    """Put values into the form of a method, as if they had been typed there; only from a callback."""
    for name, value in values.items():
        st.session_state[f"{method}_{name}"] = value.item() if hasattr(value, "item") else value


def drawer(cells: Cells, *, key: str) -> None:
    """Draw the picked cell: its tables, how its value goes along the rows, and every number of it."""
    chosen = cells.chosen()
    if chosen is None:
        st.header("One cell", anchor=False)
        st.markdown(":material/ads_click: :gray[Click a cell, a row or a token to see it in detail.]")
        return
    group, (row_key, col_key) = chosen
    view, result = group[0], cells.result
    frame = result.frames[view.frame]
    _head(frame, view, row_key, col_key, key)
    for detail in cells.arrangement.details:
        if (detail.y, detail.x) == axes_of(group):
            rows = cell_rows(result.frames[detail.frame], detail, row_key, col_key)
            result_table(rows.drop(columns=[view.x, view.y]), detail, key=f"{key}_{detail.frame}")
    if view.kind == "heatmap":
        _along(frame, view, col_key, key)
    facts = _facts(cells, group, row_key, col_key)
    st.dataframe(
        pd.DataFrame({"": facts.keys(), "value": facts.values()}),
        hide_index=True,
        height="content",
        key=f"{key}_facts",
        alt="Every number of this cell",
    )


def _head(frame: pd.DataFrame, view: View, row_key: object, col_key: object, key: str) -> None:
    assert view.y
    (row,), (col,) = axis_names(frame, view, view.y, [row_key]), axis_names(frame, view, view.x, [col_key])
    with st.container(horizontal=True, vertical_alignment="center"):
        place = f"{format.label(view.y)} {row}, {view.x.replace('_', ' ')} {col}"
        st.header(esc(place), anchor=False, width="stretch")
        st.button(
            "Clear", icon=":material/close:", type="tertiary", on_click=state.clear_cell, key=f"{key}_clear"
        )


def _along(frame: pd.DataFrame, view: View, col_key: object, key: str) -> None:
    """The picked column of the map from top to bottom, as a line; only where rows are numbers in an order."""
    assert view.y
    assert view.color
    column = trajectory(frame, view, col_key)
    if not is_numeric_dtype(column[view.y]) or len(column) < 3:
        return
    path = View("line", x=view.y, y=view.color, unit=view.unit, log=False, tooltip=view.tooltip)
    (name,) = axis_names(frame, view, view.x, [col_key])
    words = (
        f"{titled(view.color, view)} along {format.label(view.y).lower()}s, {view.x.replace('_', ' ')} {name}"
    )
    st.caption(esc(words))
    st.altair_chart(
        chart(thinned(column), path).properties(height=180),
        key=f"{key}_path",
        alt=f"{titled(view.color, view)} at every {view.y} for one {view.x}",
    )


def _facts(cells: Cells, group: Group, row_key: object, col_key: object) -> dict[str, str]:
    """Every number of the cell, from every map with the same axes; titles of frames tell equal names apart."""
    facts: dict[str, str] = {}
    for other in cells.arrangement.cells:
        if axes_of(other) != axes_of(group):
            continue
        view = other[0]
        rows = cell_rows(cells.result.frames[view.frame], view, row_key, col_key)
        if rows.empty:
            continue
        columns = dict.fromkeys(c for v in other for c in (v.color, v.text, *v.tooltip) if c)
        names = {c: display_names([c], _measuring(other, c))[c] for c in columns if c not in axes_of(group)}
        for column, name in names.items():
            facts[name if name not in facts else f"{name}, {view.frame}"] = _fact(rows.iloc[0][column])
    return facts


def _measuring(group: Group, column: str) -> View:
    """The view of a group whose colour a column is, so that it is named with its unit."""
    return next((view for view in group if view.color == column), group[0])


def _fact(value: object) -> str:
    """One number of a cell; a token keeps its own characters."""
    return format.number(float(value)) if isinstance(value, float | np.floating) else visible(str(value))
