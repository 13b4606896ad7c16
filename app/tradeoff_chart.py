"""The scatter of the Trade-offs page, from a :class:`app.tradeoff_views.Scene`. No Streamlit, no computing.

Reading it: colour is the method; opaque and large is on the front, joined by the dashed line; the fainter a point,
the less likely it belongs there. Hollow is a flagged run, a cross has no reload proof, the grey diamond is the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from app.charts import PADDING, SELECTED
from app.tradeoff_views import BASE, WHISKERS, Scene
from core.tradeoff import Objective

POINT = "point"
"""Name of the click selection; it sends back ``variant``."""
BRUSH = "brush"
"""Name of the drag selection; it sends back the ranges of ``x`` and ``y``."""
NEUTRAL = "#8A93A6"
HEIGHT = 520


def scatter(scene: Scene, *, picked: str | None, box: Sequence[float] | None) -> Any:
    """The whole chart: box, whiskers, front line, points, the ring around the picked variant."""
    x, y = _axes(scene)
    marks = _dressed(scene.marks)
    ring = marks[marks["variant"] == picked]
    # Whatever follows the selection comes last: layers before it keep their data and are not sent again.
    layers = [
        _line(scene, x, y),
        *_whiskers(marks[marks["on_front"]].head(WHISKERS), x, y, color=NEUTRAL),
        _points(marks, scene, x, y),
        _box(box, x, y),
        *_whiskers(ring, x, y, color=SELECTED),
        alt.Chart(ring[["x", "y"]])
        .mark_point(size=240, strokeWidth=2.4, color=SELECTED, filled=False)
        .encode(x=x, y=y),
    ]
    return alt.layer(*layers).properties(height=HEIGHT, padding=PADDING)


def _axes(scene: Scene) -> tuple[Any, Any]:
    x, y = (
        channel(
            f"{axis}:Q",
            title=_title(scene.marks, axis, aim),
            scale=_scale(scene.marks, axis, aim),
            axis=ticks,
        )
        for channel, axis, aim, ticks in (
            (alt.X, "x", scene.x, alt.Axis(grid=False, tickCount=8, labelFlush=True, **_labels(scene, "x"))),
            (alt.Y, "y", scene.y, alt.Axis(tickCount=6, **_labels(scene, "y"))),
        )
    )
    return x, y


def _is_log(marks: pd.DataFrame, axis: str, aim: Objective) -> bool:
    """A log axis where the objective asks for one and the values at least double."""
    values = marks[axis]
    return aim.log and len(values) > 0 and bool(values.max() >= 2 * values.min())


def _title(marks: pd.DataFrame, axis: str, aim: Objective) -> str:
    return f"{aim.label}, log" if _is_log(marks, axis, aim) else aim.label


def _scale(marks: pd.DataFrame, axis: str, aim: Objective) -> alt.Scale:
    if not _is_log(marks, axis, aim):
        return alt.Scale(zero=False, nice=True, padding=12)
    return alt.Scale(type="log", nice=False, padding=12)


def _labels(scene: Scene, axis: str) -> dict[str, Any]:
    """On a log axis a readable few per decade, the fewer the more decades there are."""
    aim = getattr(scene, axis)
    values = scene.marks[axis]
    if not _is_log(scene.marks, axis, aim):
        return {}
    low, high = float(values.min()), float(values.max())
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    spans = np.log10(high / low)
    steps = (1, 2, 3, 4, 5, 7) if spans < 1 else (1, 2, 5) if spans < 2.5 else (1, 3) if spans < 4.5 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    text = "datum.value < 0.001 ? replace(format(datum.value, '.0e'), '−', '-') : format(datum.value, ',~r')"
    return {"values": ticks, "labelExpr": text, "labelOverlap": "parity"}


def _dressed(marks: pd.DataFrame) -> pd.DataFrame:
    """Size, shape and opacity per mark; strings and floats only, so that the browser gets plain columns."""
    state, on_front = marks["state"], marks["on_front"]
    likely = 0.20 + 0.5 * marks["probability"]
    opacity = np.where(on_front, 0.95, np.where(marks["feasible"], likely, 0.14))
    opacity = np.where(state == "unproven", 0.35, opacity)
    return marks.assign(
        opacity=np.where(state == BASE, 0.95, opacity),
        fill=np.where(state.isin(["flagged", "unproven"]), 0.0, 1.0) * opacity,
        size=np.where(state == BASE, 110.0, np.where(on_front, 90.0, 40.0)),
        shape=state.map({BASE: "diamond", "unproven": "cross"}).fillna("circle"),
        chance=(marks["probability"] * 100).round(),
    )


def _points(marks: pd.DataFrame, scene: Scene, x: Any, y: Any) -> Any:
    method = alt.Color(
        "method:N",
        scale=alt.Scale(domain=scene.domain),
        legend=alt.Legend(orient="top", title=None, columns=4, symbolOpacity=1, symbolType="circle"),
    )
    columns = ["variant", "name", "method", "state", "x", "y", "x_value", "y_value", "chance"]
    return (
        alt.Chart(marks[[*columns, "opacity", "fill", "size", "shape"]])
        .mark_point(filled=True, opacity=1, strokeWidth=1.3)
        .encode(
            x=x,
            y=y,
            color=alt.when(f"datum.method === '{BASE}'").then(alt.value(NEUTRAL)).otherwise(method),
            stroke=alt.when(f"datum.method === '{BASE}'")
            .then(alt.value(NEUTRAL))
            .otherwise(alt.Stroke("method:N", scale=alt.Scale(domain=scene.domain), legend=None)),
            shape=alt.Shape("shape:N", scale=None, legend=None),
            size=alt.Size("size:Q", scale=None, legend=None),
            fillOpacity=alt.FillOpacity("fill:Q", scale=None, legend=None),
            strokeOpacity=alt.StrokeOpacity("opacity:Q", scale=None, legend=None),
            tooltip=[
                alt.Tooltip("name", title="Variant"),
                alt.Tooltip("variant", title="Id"),
                alt.Tooltip("state", title="State"),
                alt.Tooltip("x_value", title=scene.x.label, format=".4~g"),
                alt.Tooltip("y_value", title=scene.y.label, format=".4~g"),
                alt.Tooltip("chance", title="On the front (%)"),
            ],
        )
        .add_params(
            alt.selection_point(name=POINT, fields=["variant"], on="click", toggle=False),
            alt.selection_interval(name=BRUSH, encodings=["x", "y"], translate=False, zoom=False),
        )
    )


def _line(scene: Scene, x: Any, y: Any) -> Any:
    """The edge of what can be had: a budget on x buys the y of the best point within it."""
    return (
        alt.Chart(scene.front[["x", "y"]])
        .mark_line(
            interpolate="step-after" if scene.x.better == "lower" else "step-before",
            color=NEUTRAL,
            strokeWidth=1.6,
            strokeDash=[5, 3],
        )
        .encode(x=x, y=y)
    )


def _whiskers(marks: pd.DataFrame, x: Any, y: Any, *, color: str) -> list[Any]:
    """95 % intervals, where a value has one."""
    drawn = []
    for axis, other in (("x", "y"), ("y", "x")):
        columns = [other, f"{axis}_low", f"{axis}_high"]
        start = (x if axis == "x" else y).copy()
        start.shorthand = f"{axis}_low:Q"
        end = alt.X2(f"{axis}_high:Q") if axis == "x" else alt.Y2(f"{axis}_high:Q")
        channels = {axis: start, f"{axis}2": end, other: y if axis == "x" else x}
        data = marks[columns].dropna()
        drawn.append(alt.Chart(data).mark_rule(color=color, strokeWidth=1.2, opacity=0.75).encode(**channels))
    return drawn


def _box(box: Sequence[float] | None, x: Any, y: Any) -> Any:
    """The brushed box as it stands in the address, so that a shared link shows it too."""
    data = pd.DataFrame([box] if box else [], columns=["x0", "x1", "y0", "y1"], dtype=float)
    left, bottom = x.copy(), y.copy()
    left.shorthand, bottom.shorthand = "x0:Q", "y0:Q"
    return (
        alt.Chart(data)
        .mark_rect(color=SELECTED, opacity=0.10, stroke=SELECTED, strokeOpacity=0.6)
        .encode(x=left, x2="x1:Q", y=bottom, y2="y1:Q")
    )


def layer_errors(errors: pd.DataFrame) -> Any:
    """Bars of the relative weight error per layer; hovering names the layer and the value."""
    ticks = list(range(0, int(errors["layer"].max()) + 1, max(1, len(errors) // 5)))
    return (
        alt.Chart(errors)
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            x=alt.X("layer:O", title="Layer", axis=alt.Axis(values=ticks, labelAngle=0, ticks=False)),
            y=alt.Y("relative_error:Q", title=None, axis=alt.Axis(tickCount=3, format=".2~g")),
            tooltip=[
                alt.Tooltip("layer", title="Layer"),
                alt.Tooltip("relative_error", title="Relative error", format=".4~g"),
            ],
        )
        .properties(height=130, padding=PADDING)
    )
