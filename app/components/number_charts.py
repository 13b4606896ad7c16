"""The charts of a number format: its values on a line, their spacing, the error over magnitudes, and all formats' SQNR.

Frames come from ``app.number_views``; nothing is computed here.
"""

from __future__ import annotations

from typing import Any, Literal

import altair as alt
import pandas as pd

from app.charts import PADDING, SELECTED

Axis = Literal["linear", "log"]
ROW = 34
"""Pixels of one format on the number line."""
CURVE_HEIGHT = 330
GAUSSIAN_BOUND_DB = 6.0206
"""dB per bit that no code of a Gaussian can beat (rate-distortion theory)."""


def number_line(
    values: pd.DataFrame, marks: pd.DataFrame, *, axis: Axis, domain: tuple[float, float], chosen: str
) -> Any:
    """Every value as a tick, one row a format; ``marks`` has the typed number (``stored`` NaN) and where it goes.

    ``values``: format, value, kind. ``marks``: format, number, stored.
    """
    order = list(dict.fromkeys(values["format"]))
    scale = (
        alt.Scale(type="log", domain=domain, nice=False, clamp=False)
        if axis == "log"
        else alt.Scale(domain=domain, nice=False)
    )
    x = alt.X("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=10, grid=False, format="~g"))
    y = alt.Y(
        "format:N",
        title=None,
        sort=order,
        axis=alt.Axis(ticks=False, domain=False, labelLimit=130, labelFontSize=12, labelFontWeight=alt.condition(
            alt.datum.value == chosen, alt.value("bold"), alt.value("normal")
        )),
    )  # fmt: skip
    shown = values[values["value"].between(*domain)]
    ticks = (
        alt.Chart(shown)
        .mark_tick(thickness=1.4, size=18)
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=["normal", "subnormal", "zero"]),
                legend=alt.Legend(orient="top", title=None, symbolType="square", symbolOpacity=1),
            ),
            tooltip=[
                alt.Tooltip("format:N", title="Format"),
                alt.Tooltip("value:Q", title="Value", format=".8~g"),
                alt.Tooltip("kind:N", title="Kind"),
            ],
        )
    )
    inside = marks[marks["number"].between(*domain)]
    number = (
        alt.Chart(inside.head(1))
        .mark_rule(color=SELECTED, strokeDash=[4, 3], strokeWidth=1.4)
        .encode(x=alt.X("number:Q", scale=scale, title=None))
    )
    stored = (
        alt.Chart(marks[marks["stored"].between(*domain)])
        .mark_point(filled=True, color=SELECTED, size=70, opacity=1)
        .encode(
            x=alt.X("stored:Q", scale=scale, title=None),
            y=y,
            tooltip=[
                alt.Tooltip("format:N", title="Format"),
                alt.Tooltip("number:Q", title="Number", format=".8~g"),
                alt.Tooltip("stored:Q", title="Reads back", format=".8~g"),
            ],
        )
    )
    return (ticks + number + stored).properties(height=ROW * len(order) + 6, padding=PADDING)


def spacing_chart(frame: pd.DataFrame, *, number: float) -> Any:
    """Distance to the next value over the magnitude, both logarithmic: floats climb stairs, integers stay level."""
    lines = (
        alt.Chart(frame)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("value:Q", title="Magnitude", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=6, grid=False, format="~g")),
            y=alt.Y("spacing:Q", title="Distance to the next value", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=6, format="~g")),
            color=_series(frame),
            tooltip=[alt.Tooltip("format:N", title="Format"), alt.Tooltip("value:Q", title="From", format=".4~g"), alt.Tooltip("spacing:Q", title="Spacing", format=".4~g")],
        )
    )  # fmt: skip
    return _with_number(lines, number).properties(height=CURVE_HEIGHT, padding=PADDING)


def error_chart(frame: pd.DataFrame, *, number: float) -> Any:
    """Relative error over the magnitude: a float's teeth are all as high, an integer's grow towards zero."""
    lines = (
        alt.Chart(frame)
        .mark_line(strokeWidth=1.8)
        .encode(
            x=alt.X("value:Q", title="Magnitude", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(tickCount=6, grid=False, format="~g")),
            y=alt.Y("relative_error:Q", title="Largest relative error", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(values=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1], format="~%")),
            color=_series(frame),
            tooltip=[alt.Tooltip("format:N", title="Format"), alt.Tooltip("value:Q", title="Number", format=".4~g"), alt.Tooltip("relative_error:Q", title="Relative error", format=".3~g")],
        )
    )  # fmt: skip
    return _with_number(lines, number).properties(height=CURVE_HEIGHT, padding=PADDING)


def _series(frame: pd.DataFrame) -> Any:
    names = list(dict.fromkeys(frame["format"]))
    legend = alt.Legend(orient="top", title=None, columns=3, symbolOpacity=1)
    return alt.Color("format:N", scale=alt.Scale(domain=names), sort=None, legend=legend)


def _with_number(lines: Any, number: float) -> Any:
    if number == 0:
        return lines
    rule = alt.Chart(pd.DataFrame({"number": [abs(number)]})).mark_rule(color=SELECTED, strokeDash=[4, 3])
    return lines + rule.encode(x=alt.X("number:Q", title="Magnitude"))


LEFT = {"float8 e4m3", "float8 e5m2", "NF4", "MXFP4", "MXFP6 e2m3"}
"""Formats whose name stands left of its point, where a neighbour's stands right."""
LOWER = {
    "int6": -10,
    "int4": 9,
    "NVFP4": -8,
    "int2": 8,
    "NF4": -5,
    "ternary": -7,
    "MXFP6 e3m2": 10,
    "float8 e5m2": -8,
}
"""Formats whose name is moved down (pixels), out of a neighbour's way."""


def _places(titles: pd.Series) -> dict[tuple[Literal["left", "right"], int], list[str]]:
    """Where names stand, and which."""
    places: dict[tuple[Literal["left", "right"], int], list[str]] = {}
    for title in titles:
        places.setdefault(("right" if title in LEFT else "left", LOWER.get(title, 0)), []).append(title)
    return places


def sqnr_chart(table: pd.DataFrame, *, column: str, chosen: str) -> Any:
    """Signal to noise against bits per weight, with the bound that no code of a Gaussian can pass."""
    shown = table[table["bits_per_weight"] <= 10].assign(chosen=table["format"] == chosen)
    points = alt.Chart(shown).encode(
        x=alt.X("bits_per_weight:Q", title="Bits per weight", scale=alt.Scale(domain=[2, 9.6], nice=False), axis=alt.Axis(grid=False, values=list(range(2, 10)))),
        y=alt.Y(f"{column}:Q", title="SQNR (dB)", scale=alt.Scale(zero=True)),
        tooltip=[alt.Tooltip("format:N", title="Format"), alt.Tooltip("bits_per_weight:Q", title="Bits per weight", format=".4~g"), alt.Tooltip(f"{column}:Q", title="SQNR (dB)", format=".3~g")],
    )  # fmt: skip
    colour = alt.Color(
        "family:N", sort=None, legend=alt.Legend(orient="top", title=None, symbolOpacity=1, columns=4)
    )
    dots = points.mark_circle(size=75, opacity=1).encode(color=colour)
    ring = points.transform_filter("datum.chosen").mark_point(
        color=SELECTED, size=190, strokeWidth=2, filled=False, opacity=1
    )
    names = alt.layer(
        *(
            points.transform_filter(alt.FieldOneOfPredicate("format", titles))
            .mark_text(align=align, dx=9 if align == "left" else -9, dy=dy, fontSize=10.5)
            .encode(text="format:N", color=colour)
            for (align, dy), titles in _places(shown["format"]).items()
        )
    )
    bound = pd.DataFrame({"bits_per_weight": [2.0, 9.6]})
    bound["bound"] = bound["bits_per_weight"] * GAUSSIAN_BOUND_DB
    line = alt.Chart(bound).mark_line(strokeDash=[4, 3], color="gray").encode(
        x="bits_per_weight:Q", y=alt.Y("bound:Q", title="SQNR (dB)")
    )  # fmt: skip
    layers = line + dots + ring + names if column == "gaussian_db" else dots + ring + names
    return layers.properties(height=CURVE_HEIGHT, padding=PADDING)
