"""A frame and its View become an Altair chart; no Streamlit here, and no data is computed.

Colours come from the theme (``.streamlit/config.toml``), so light and dark both work. A chart never holds more
than ``MARK_LIMIT`` marks: what is larger is thinned in ``app.views`` or drawn by ``app.components.heat_canvas``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import altair as alt
import pandas as pd
from pandas.api.types import is_float_dtype, is_numeric_dtype

from app.format import label, short_unit
from core.types import View

Limits = Mapping[str, tuple[float, float]]
"""Column → the ends of its scale."""
MARK_LIMIT = 10_000
PADDING = {"left": 4, "right": 14, "top": 4, "bottom": 4}
PICK = "pick"
"""Name of the click selection of every chart drawn with ``pick=``."""
SELECTED = "#F08C00"
"""The colour of what is picked, the same in every chart and component."""


def chart(
    frame: pd.DataFrame, view: View, *, pick: tuple[str, ...] = (), limits: Limits | None = None
) -> Any:
    """The chart of a view; ``pick`` names the columns a click sends back under :data:`PICK`.

    ``limits`` are the ends of columns' scales where several charts share them. Raises ``ValueError`` for kinds that are
    no charts (table, image) and for too many marks.
    """
    if view.kind not in _DRAW:
        raise ValueError(
            f"a view of kind {view.kind!r} is no chart; draw it with app.components.result_panel"
        )
    if len(frame) > MARK_LIMIT:
        raise ValueError(f"{len(frame)} marks are more than {MARK_LIMIT}; thin the frame in app.views first")
    drawn = _DRAW[view.kind](frame, view, limits or {})
    if pick:
        # Without `fields` the browser sends row numbers that mean nothing after the next change of data.
        drawn = drawn.add_params(alt.selection_point(name=PICK, fields=list(pick), on="click", toggle=False))
    return drawn.properties(padding=PADDING)


def titled(column: str, view: View) -> str:
    """The axis or legend title of a column; the measured one carries the view's unit."""
    measured = view.color if view.kind in ("heatmap", "tokens", "flow", "image") else view.y
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


def _color_scale(view: View, limits: Limits) -> Any:
    ends = list(limits.get(view.color or "", ()))
    domain: dict[str, Any] = {"domain": ends} if ends else {}
    if view.midpoint is not None:
        if ends:
            reach = max(abs(end - view.midpoint) for end in ends)
            domain = {"domain": [view.midpoint - reach, view.midpoint + reach]}
        return alt.Scale(domainMid=view.midpoint, **domain)
    if view.log:
        return alt.Scale(type="symlog", **domain)
    return alt.Scale(**domain) if domain else alt.Undefined


def _ordinal(channel: Callable[..., Any], column: str, frame: pd.DataFrame, view: View) -> Any:
    """A discrete axis that shows at most about sixteen tick labels, in the frame's own order unless numeric."""
    values = frame[column].drop_duplicates()
    every = max(1, -(-len(values) // 16))
    ticks = list(values.sort_values() if is_numeric_dtype(values) else values)[::every]
    axis = alt.Axis(values=ticks, labelAngle=0, ticks=False, domain=False, labelLimit=160)
    sort = "ascending" if is_numeric_dtype(values) else None
    return channel(f"{column}:O", title=titled(column, view), axis=axis, sort=sort)


def _heatmap(frame: pd.DataFrame, view: View, limits: Limits) -> Any:
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
                scale=_color_scale(view, limits),
                legend=alt.Legend(gradientLength=140, titleLimit=200),
            ),
            tooltip=_tooltip(frame, view),
        )
        .properties(height=max(120, min(460, rows * 14)))
    )


def _quantity(channel: Callable[..., Any], column: str, view: View, limits: Limits, *, zero: bool) -> Any:
    ends = limits.get(column)
    domain: dict[str, Any] = {}
    if ends:
        domain = {"domain": [min(0, ends[0]), max(0, ends[1])] if zero and not view.log else list(ends)}
    scale = alt.Scale(type="log", **domain) if view.log else alt.Scale(zero=zero, nice=True, **domain)
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


def _line(frame: pd.DataFrame, view: View, limits: Limits) -> Any:
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
            y=_quantity(alt.Y, view.y, view, limits, zero=False),
            color=_series(frame, view),
            tooltip=_tooltip(frame, view),
        )
        .properties(height=260)
    )


def _bar(frame: pd.DataFrame, view: View, limits: Limits) -> Any:
    assert view.y
    names = not is_numeric_dtype(frame[view.x])
    base = alt.Chart(frame).mark_bar(cornerRadiusEnd=2)
    common = {"color": _series(frame, view), "tooltip": _tooltip(frame, view)}
    if names:  # names read best beside their bar
        category = alt.Y(
            f"{view.x}:N", title=None, sort=None, axis=alt.Axis(labelLimit=220, ticks=False, domain=False)
        )
        drawn = base.encode(y=category, x=_quantity(alt.X, view.y, view, limits, zero=True), **common)
        return drawn.properties(height=max(80, 26 * frame[view.x].nunique()))
    return base.encode(
        x=_ordinal(alt.X, view.x, frame, view), y=_quantity(alt.Y, view.y, view, limits, zero=True), **common
    ).properties(height=220)


def _scatter(frame: pd.DataFrame, view: View, limits: Limits) -> Any:
    assert view.y
    return (
        alt.Chart(frame)
        .mark_circle(size=48, opacity=0.8)
        .encode(
            x=_quantity(alt.X, view.x, replace(view, log=False), limits, zero=False),
            y=_quantity(alt.Y, view.y, view, limits, zero=False),
            color=_series(frame, view),
            tooltip=_tooltip(frame, view),
        )
        .properties(height=320)
    )


def _tokens(frame: pd.DataFrame, view: View, limits: Limits) -> Any:
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


FLOW_EDGES = 200
"""Edges of a flow that are drawn: the heaviest; more are a tangle."""


def _flow(frame: pd.DataFrame, view: View, limits: Limits) -> Any:
    """Edges from ``x`` (left) to ``y`` (right), as thick as the size of ``color`` and coloured by its sign."""
    assert view.y
    assert view.color
    heaviest = frame.loc[frame[view.color].abs().nlargest(FLOW_EDGES).index].reset_index(drop=True)
    edges = heaviest.assign(edge=heaviest.index, size=heaviest[view.color].abs())
    ends = [
        edges.assign(side=side, node=edges[column].astype(str))
        for side, column in enumerate((view.x, view.y))
    ]
    nodes = list(dict.fromkeys([*frame[view.x].astype(str), *frame[view.y].astype(str)]))
    side = alt.X("side:Q", title=None, axis=None, scale=alt.Scale(domain=[0, 1], nice=False, padding=40))
    base = alt.Chart(pd.concat(ends)).encode(
        x=side,
        y=alt.Y("node:N", title=None, sort=nodes, axis=alt.Axis(ticks=False, domain=False, labelLimit=160)),
        tooltip=_tooltip(frame, view),
    )
    lines = base.mark_line(opacity=0.7, strokeCap="round").encode(
        detail="edge:N",
        strokeWidth=alt.StrokeWidth("size:Q", scale=alt.Scale(range=[0.5, 6]), legend=None),
        color=alt.Color(f"{view.color}:Q", title=titled(view.color, view), scale=_color_scale(view, limits)),
    )
    return (lines + base.mark_circle(size=40, color="gray")).properties(height=max(160, 18 * len(nodes)))


_DRAW: dict[str, Callable[[pd.DataFrame, View, Limits], Any]] = {
    "heatmap": _heatmap,
    "line": _line,
    "bar": _bar,
    "scatter": _scatter,
    "tokens": _tokens,
    "flow": _flow,
}
