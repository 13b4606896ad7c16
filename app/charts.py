"""A frame and its View become an Altair chart; no Streamlit here, and no data is computed.

Colours come from the theme (``.streamlit/config.toml``), so light and dark both work. A chart never holds more
than ``MARK_LIMIT`` marks: what is larger is thinned in ``app.views`` or drawn by ``app.components.heat_canvas``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import altair as alt
import pandas as pd
from pandas.api.types import is_float_dtype, is_numeric_dtype

from app.format import label, short_unit
from core.types import View

MARK_LIMIT = 10_000
PADDING = {"left": 4, "right": 14, "top": 4, "bottom": 4}
PICK = "pick"
"""Name of the click selection of every chart drawn with ``pick=``."""
SELECTED = "#F08C00"
"""The colour of what is picked, the same in every chart and component."""


def chart(frame: pd.DataFrame, view: View, *, pick: tuple[str, ...] = ()) -> Any:
    """The chart of a view; ``pick`` names the columns a click sends back under :data:`PICK`.

    Raises ``ValueError`` for kinds that are no charts (table, flow) and for too many marks.
    """
    if view.kind not in _DRAW:
        raise ValueError(
            f"a view of kind {view.kind!r} is no chart; draw it with app.components.result_panel"
        )
    if len(frame) > MARK_LIMIT:
        raise ValueError(f"{len(frame)} marks are more than {MARK_LIMIT}; thin the frame in app.views first")
    drawn = _DRAW[view.kind](frame, view)
    if pick:
        # Without `fields` the browser sends row numbers that mean nothing after the next change of data.
        drawn = drawn.add_params(alt.selection_point(name=PICK, fields=list(pick), on="click", toggle=False))
    return drawn.properties(padding=PADDING)


def titled(column: str, view: View) -> str:
    """The axis or legend title of a column; the measured one carries the view's unit."""
    measured = {"heatmap": view.color, "tokens": view.color}.get(view.kind, view.y)
    words, unit = label(column), short_unit(view.unit)
    said = not unit or column != measured or unit.lower() in words.lower()
    return words if said else f"{words} ({unit})"


def _tooltip(frame: pd.DataFrame, view: View) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(
            column,
            title=titled(column, view),
            format=".4~g" if is_float_dtype(frame[column]) else alt.Undefined,
        )
        for column in view.columns
    ]


def _color_scale(view: View) -> Any:
    if view.midpoint is not None:
        return alt.Scale(domainMid=view.midpoint)
    return alt.Scale(type="symlog") if view.log else alt.Undefined


def _ordinal(channel: Callable[..., Any], column: str, frame: pd.DataFrame, view: View) -> Any:
    """A discrete axis that shows at most about sixteen tick labels, in the frame's own order unless numeric."""
    values = frame[column].drop_duplicates()
    every = max(1, -(-len(values) // 16))
    ticks = list(values.sort_values() if is_numeric_dtype(values) else values)[::every]
    axis = alt.Axis(values=ticks, labelAngle=0, ticks=False, domain=False, labelLimit=160)
    sort = "ascending" if is_numeric_dtype(values) else None
    return channel(f"{column}:O", title=titled(column, view), axis=axis, sort=sort)


def _heatmap(frame: pd.DataFrame, view: View) -> Any:
    assert view.y
    assert view.color
    rows = frame[view.y].nunique()
    return (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=_ordinal(alt.X, view.x, frame, view),
            y=_ordinal(alt.Y, view.y, frame, view),
            color=alt.Color(
                f"{view.color}:Q",
                title=titled(view.color, view),
                scale=_color_scale(view),
                legend=alt.Legend(gradientLength=140, titleLimit=200),
            ),
            tooltip=_tooltip(frame, view),
        )
        .properties(height=max(120, min(460, rows * 14)))
    )


def _quantity(channel: Callable[..., Any], column: str, view: View, *, zero: bool) -> Any:
    scale = alt.Scale(type="log") if view.log else alt.Scale(zero=zero, nice=True)
    return channel(f"{column}:Q", title=titled(column, view), scale=scale, axis=alt.Axis(tickCount=6))


def _series(frame: pd.DataFrame, view: View) -> Any:
    """Colour by a column: a legend above for names, the theme's ramp for numbers."""
    if view.color is None:
        return alt.Undefined
    kind, legend = (
        ("Q", alt.Legend())
        if is_numeric_dtype(frame[view.color])
        else (
            "N",
            alt.Legend(orient="top", title=None, columns=2, symbolOpacity=1),
        )
    )
    return alt.Color(f"{view.color}:{kind}", title=titled(view.color, view), legend=legend, sort=None)


def _line(frame: pd.DataFrame, view: View) -> Any:
    assert view.y
    return (
        alt.Chart(frame)
        .mark_line(point=alt.OverlayMarkDef(size=26), strokeWidth=2)
        .encode(
            x=alt.X(
                f"{view.x}:Q",
                title=titled(view.x, view),
                axis=alt.Axis(tickMinStep=1, grid=False),
                scale=alt.Scale(nice=False),
            ),
            y=_quantity(alt.Y, view.y, view, zero=False),
            color=_series(frame, view),
            tooltip=_tooltip(frame, view),
        )
        .properties(height=260)
    )


def _bar(frame: pd.DataFrame, view: View) -> Any:
    assert view.y
    names = not is_numeric_dtype(frame[view.x])
    base = alt.Chart(frame).mark_bar(cornerRadiusEnd=2)
    common = {"color": _series(frame, view), "tooltip": _tooltip(frame, view)}
    if names:  # names read best beside their bar
        category = alt.Y(
            f"{view.x}:N", title=None, sort=None, axis=alt.Axis(labelLimit=220, ticks=False, domain=False)
        )
        drawn = base.encode(y=category, x=_quantity(alt.X, view.y, view, zero=True), **common)
        return drawn.properties(height=max(80, 26 * frame[view.x].nunique()))
    return base.encode(
        x=_ordinal(alt.X, view.x, frame, view), y=_quantity(alt.Y, view.y, view, zero=True), **common
    ).properties(height=220)


def _scatter(frame: pd.DataFrame, view: View) -> Any:
    assert view.y
    return (
        alt.Chart(frame)
        .mark_circle(size=48, opacity=0.8)
        .encode(
            x=alt.X(f"{view.x}:Q", title=titled(view.x, view), scale=alt.Scale(zero=False)),
            y=_quantity(alt.Y, view.y, view, zero=False),
            color=_series(frame, view),
            tooltip=_tooltip(frame, view),
        )
        .properties(height=320)
    )


def _tokens(frame: pd.DataFrame, view: View) -> Any:
    """The strip of tokens as bars, for a picture of it; the page itself draws ``app.components.token_strip``."""
    assert view.color
    return (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=_ordinal(alt.X, view.x, frame, view),
            y=alt.Y(f"{view.color}:Q", title=titled(view.color, view)),
            tooltip=_tooltip(frame, view),
        )
        .properties(height=200)
    )


_DRAW: dict[str, Callable[[pd.DataFrame, View], Any]] = {
    "heatmap": _heatmap,
    "line": _line,
    "bar": _bar,
    "scatter": _scatter,
    "tokens": _tokens,
}
