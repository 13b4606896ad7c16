"""The charts of measured speed: distributions, one run in order, the ratios of paired blocks. No Streamlit, no computing.

Frames come from ``app.sample_views``.
"""

from __future__ import annotations

from typing import Any, Literal

import altair as alt
import pandas as pd

from app.charts import PADDING, SELECTED

Shape = Literal["strip", "ecdf"]
PICK = "picked"
"""Name of the click selection of the distributions; it sends back ``run``."""
NEUTRAL = "#8A93A6"
ROW = 36
"""Pixels of one cell."""
LEGEND_ROW = 21
"""Pixels of a line of the legend, which Streamlit takes from the chart's height."""
LABEL = 360
"""Pixels of a cell's name at most."""


def _log_where_wide(values: pd.Series) -> alt.Scale:
    wide = len(values) > 0 and values.min() > 0 and values.max() > 6 * values.min()
    return (
        alt.Scale(type="log", nice=False, padding=8) if wide else alt.Scale(zero=False, nice=True, padding=8)
    )


def _variant_color(domain: list[str]) -> alt.Color:
    return alt.Color("name:N", scale=alt.Scale(domain=domain), legend=None)


# --- distributions --------------------------------------------------------------------------------------


def distributions(
    samples: pd.DataFrame,
    medians: pd.DataFrame,
    *,
    shape: Shape,
    title: str,
    picked: str | None,
    domain: list[str],
) -> Any:
    """Every timed sample of each cell, with the median and its 95 % interval; as strips or as ECDFs.

    ``samples`` and ``medians`` are ``sample_views.strips`` and ``medians``; ``domain`` are all variants' names in their order.
    """
    named = samples.merge(medians[["run", "name"]], on="run", how="left")
    scale = _log_where_wide(pd.concat([samples["value_ms"], medians["time_ms"]]))
    x = alt.X("value_ms:Q", title=title, scale=scale, axis=alt.Axis(tickCount=8, format="~g"))
    if shape == "ecdf":
        return _ecdf(named, medians, x, domain)
    order = medians["label"].tolist()
    y = alt.Y("label:N", title=None, sort=order, axis=alt.Axis(ticks=False, domain=False, labelLimit=LABEL))
    ticks = (
        alt.Chart(named)
        .mark_tick(thickness=1.1, size=14, yOffset=-5)
        .encode(
            x=x,
            y=y,
            color=_variant_color(domain),
            opacity=alt.when("datum.contended").then(alt.value(0.95)).otherwise(alt.value(0.38)),
            strokeDash=alt.StrokeDash(
                "contended:N", legend=None, scale=alt.Scale(domain=[False, True], range=[[1, 0], [2, 2]])
            ),
            tooltip=[
                alt.Tooltip("label:N", title="Cell"),
                alt.Tooltip("value_ms:Q", title="Sample (ms)", format=".4~g"),
                alt.Tooltip("contended:N", title="Contended"),
            ],
        )
    )
    middle = x.copy()
    middle.shorthand = "time_ms:Q"
    low = x.copy()
    low.shorthand = "time_low:Q"
    whiskers = (
        alt.Chart(medians.dropna(subset=["time_low", "time_high"]))
        .mark_rule(strokeWidth=2.4, color=NEUTRAL, yOffset=9)
        .encode(x=low, x2="time_high:Q", y=y)
    )
    points = (
        alt.Chart(medians)
        .mark_point(filled=True, size=80, opacity=1, strokeWidth=1.6, shape="diamond", yOffset=9)
        .encode(
            x=middle,
            y=y,
            color=alt.when(f"datum.run === '{picked or ''}'")
            .then(alt.value(SELECTED))
            .otherwise(_variant_color(domain)),
            fillOpacity=alt.when("datum.flagged").then(alt.value(0)).otherwise(alt.value(1)),
            stroke=alt.when(f"datum.run === '{picked or ''}'")
            .then(alt.value(SELECTED))
            .otherwise(alt.Stroke("name:N", scale=alt.Scale(domain=domain), legend=None)),
            tooltip=_median_tooltip(),
        )
        .add_params(alt.selection_point(name=PICK, fields=["run"], on="click", toggle=False))
    )
    return alt.layer(ticks, whiskers, points).properties(height=max(90, ROW * len(medians)), padding=PADDING)


def _median_tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("label:N", title="Cell"),
        alt.Tooltip("time_ms:Q", title="Median (ms)", format=".4~g"),
        alt.Tooltip("time_low:Q", title="95 % from", format=".4~g"),
        alt.Tooltip("time_high:Q", title="to", format=".4~g"),
        alt.Tooltip("rate:Q", title="Rate", format=".4~g"),
        alt.Tooltip("rate_unit:N", title="in"),
        alt.Tooltip("told:N", title="Loss"),
        alt.Tooltip("n:Q", title="Samples"),
        alt.Tooltip("flagged:N", title="Flagged"),
    ]


def _ecdf(samples: pd.DataFrame, medians: pd.DataFrame, x: Any, domain: list[str]) -> Any:
    """The share of samples at or below each time, a line per cell, with its median on the half."""
    order = medians["label"].tolist()
    dash = alt.StrokeDash("label:N", sort=order, legend=None)
    color = alt.Color(
        "label:N", sort=order, legend=alt.Legend(orient="bottom", title=None, columns=1, labelLimit=520)
    )
    lines = (
        alt.Chart(samples)
        .mark_line(interpolate="step-after", strokeWidth=1.8)
        .encode(
            x=x,
            y=alt.Y("share:Q", title="Share of samples", axis=alt.Axis(format="%")),
            color=color,
            strokeDash=dash,
            tooltip=[
                alt.Tooltip("label:N", title="Cell"),
                alt.Tooltip("value_ms:Q", format=".4~g"),
                alt.Tooltip("share:Q", format=".0%"),
            ],
        )
    )
    middle = x.copy()
    middle.shorthand = "time_ms:Q"
    points = (
        alt.Chart(medians.assign(half=0.5))
        .mark_point(filled=True, size=70, opacity=1)
        .encode(x=middle, y="half:Q", color=color, tooltip=_median_tooltip())
        .add_params(alt.selection_point(name=PICK, fields=["run"], on="click", toggle=False))
    )
    return alt.layer(lines, points).properties(height=340 + LEGEND_ROW * len(medians), padding=PADDING)


def in_order(samples: pd.DataFrame) -> Any:
    """One run's samples as they were taken, so that a drift or a disturbance is seen."""
    tips = [alt.Tooltip("iteration:Q", title="Sample"), alt.Tooltip("value_ms:Q", title="ms", format=".4~g")]
    tips += (
        [alt.Tooltip("other_cpu:Q", title="Other programs", format=".0%")] if "other_cpu" in samples else []
    )
    return (
        alt.Chart(samples)
        .mark_circle(size=26, opacity=0.8)
        .encode(
            x=alt.X("iteration:Q", title="Sample, in order", axis=alt.Axis(grid=False)),
            y=alt.Y("value_ms:Q", title="ms", scale=_log_where_wide(samples["value_ms"])),
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(
                    domain=["measured", "warm-up", "contended"], range=["#5C7AE8", NEUTRAL, "#D9730D"]
                ),
                legend=alt.Legend(orient="top", title=None),
            ),
            tooltip=tips,
        )
        .properties(height=180, padding=PADDING)
    )


# --- A against B ----------------------------------------------------------------------------------------


def block_ratios(
    ratios: pd.DataFrame, ratio: float, low: float | None, high: float | None, delta: float
) -> Any:
    """Every block's ratio, the verdict's interval as a band, and the stretch in which the two count as equal."""
    scale = alt.Scale(type="log", nice=False, padding=12)
    y = alt.Y("ratio:Q", title="Speed of B ÷ A", scale=scale, axis=alt.Axis(format=".3~g", tickCount=6))
    equal = (
        alt.Chart(pd.DataFrame({"from": [1 / (1 + delta)], "to": [1 + delta]}))
        .mark_rect(color=NEUTRAL, opacity=0.16)
        .encode(y=alt.Y("from:Q", scale=scale, title="Speed of B ÷ A"), y2="to:Q")
    )
    one = alt.Chart(pd.DataFrame({"ratio": [1.0]})).mark_rule(color=NEUTRAL, strokeDash=[4, 3]).encode(y=y)
    layers = [equal, one]
    if low is not None and high is not None:
        band = pd.DataFrame({"from": [low], "to": [high]})
        layers.append(
            alt.Chart(band)
            .mark_rect(color=SELECTED, opacity=0.25)
            .encode(y=alt.Y("from:Q", scale=scale), y2="to:Q")
        )
    middle = alt.Chart(pd.DataFrame({"ratio": [ratio]})).mark_rule(color=SELECTED, strokeWidth=2).encode(y=y)
    points = (
        alt.Chart(ratios)
        .mark_circle(size=46, opacity=0.85)
        .encode(
            x=alt.X("block:Q", title="Block", axis=alt.Axis(grid=False, tickMinStep=1)),
            y=y,
            color=alt.when("datum.contended").then(alt.value("#D9730D")).otherwise(alt.value("#5C7AE8")),
            tooltip=[
                alt.Tooltip("block:Q", title="Block"),
                alt.Tooltip("ratio:Q", title="B ÷ A", format=".4~g"),
                alt.Tooltip("first:N", title="Began"),
                alt.Tooltip("contended:N", title="Contended"),
            ],
        )
    )
    return alt.layer(*layers, middle, points).properties(height=280, padding=PADDING)
