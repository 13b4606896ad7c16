"""The charts of where the time goes: by component, one step as nested spans, every phase under the roofs. No Streamlit.

Frames come from ``app.where_views``; nothing is computed here.
"""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from app.charts import PADDING, SELECTED
from app.profile_charts import NEUTRAL, PICK

# --- where the time goes --------------------------------------------------------------------------------


def component_bars(parts: pd.DataFrame) -> Any:
    """Milliseconds of a step by component, one row of bars per model: columns component, model, self_ms, share."""
    order = parts.groupby("component")["self_ms"].max().sort_values(ascending=False).index.tolist()
    several = parts["model"].nunique() > 1
    color = alt.Color(
        "model:N",
        sort=None,
        legend=alt.Legend(orient="top", title=None, columns=1, labelLimit=420) if several else None,
    )
    return (
        alt.Chart(parts)
        .mark_bar(cornerRadiusEnd=2)
        .encode(
            y=alt.Y(
                "component:N",
                sort=order,
                title=None,
                axis=alt.Axis(ticks=False, domain=False, labelOverlap=False),
            ),
            yOffset=alt.YOffset("model:N", sort=None) if several else alt.Undefined,
            x=alt.X("self_ms:Q", title="ms of a step", axis=alt.Axis(tickCount=6)),
            color=color,
            tooltip=[
                alt.Tooltip("component:N", title="Component"),
                alt.Tooltip("model:N", title="Model"),
                alt.Tooltip("self_ms:Q", title="ms", format=".4~g"),
                alt.Tooltip("share:Q", title="Of the step", format=".1%"),
            ],
        )
        .properties(height=70 + (36 if several else 24) * len(order), padding=PADDING)
    )


def flame(spans: pd.DataFrame) -> Any:
    """Spans of one step as nested boxes: columns name, start_ms, end_ms, depth, component, ms."""
    return (
        alt.Chart(spans)
        .mark_rect(stroke="white", strokeWidth=0.3)
        .encode(
            x=alt.X("start_ms:Q", title="ms since the step began", scale=alt.Scale(nice=False)),
            x2="end_ms:Q",
            y=alt.Y("depth:O", title=None, axis=None),
            color=alt.Color("component:N", legend=alt.Legend(orient="top", title=None, columns=8)),
            tooltip=[
                alt.Tooltip("name:N", title="What"),
                alt.Tooltip("component:N", title="Component"),
                alt.Tooltip("ms:Q", title="ms, with a profiler looking on", format=".4~g"),
            ],
        )
        .properties(height=110 + 20 * int(spans["depth"].nunique()), padding=PADDING)
    )


# --- roofline -------------------------------------------------------------------------------------------


def roofline(points: pd.DataFrame, lines: pd.DataFrame, *, domain: list[str], picked: str | None) -> Any:
    """Every measured phase under the roofs: ``points`` of ``core.profile.roofline``, ``lines`` of ``roofs_for``."""
    x = alt.X(
        "intensity:Q",
        title="FLOP per byte that must be read, log",
        axis=alt.Axis(grid=False, format="~g", labelOverlap="parity"),
        scale=alt.Scale(type="log", nice=False, padding=10),
    )
    y = alt.Y(
        "gflops:Q",
        title="GFLOP/s, log",
        scale=alt.Scale(type="log", nice=False, padding=10),
        axis=alt.Axis(grid=False, format="~g", labelOverlap="parity"),
    )
    roof = (
        alt.Chart(lines)
        .mark_line(color=NEUTRAL, strokeWidth=1.8)
        .encode(
            x=x,
            y=y,
            strokeDash=alt.StrokeDash(
                "roof:N", legend=alt.Legend(orient="top", title=None, columns=1, labelLimit=420)
            ),
        )
    )
    marks = (
        alt.Chart(points)
        .mark_point(filled=True, opacity=0.95, strokeWidth=1.4)
        .encode(
            x=x,
            y=y,
            color=alt.when(f"datum.key === '{picked or ''}'")
            .then(alt.value(SELECTED))
            .otherwise(alt.Color("name:N", scale=alt.Scale(domain=domain), legend=None)),
            stroke=alt.when(f"datum.key === '{picked or ''}'")
            .then(alt.value(SELECTED))
            .otherwise(alt.Stroke("name:N", scale=alt.Scale(domain=domain), legend=None)),
            shape=alt.Shape(
                "phase:N",
                legend=alt.Legend(
                    orient="top", title=None, symbolFillColor=NEUTRAL, symbolStrokeColor=NEUTRAL
                ),
            ),
            size=alt.when(f"datum.key === '{picked or ''}'").then(alt.value(170)).otherwise(alt.value(90)),
            fillOpacity=alt.when("datum.flagged").then(alt.value(0)).otherwise(alt.value(1)),
            tooltip=[
                alt.Tooltip("label:N", title="Cell"),
                alt.Tooltip("phase:N", title="Phase"),
                alt.Tooltip("ms:Q", title="ms", format=".4~g"),
                alt.Tooltip("gflops:Q", title="GFLOP/s", format=".4~g"),
                alt.Tooltip("share_of_bandwidth:Q", title="Of the bandwidth", format=".0%"),
                alt.Tooltip("share_of_matrix_rate:Q", title="Of the matrix rate", format=".0%"),
                alt.Tooltip("bound:N", title="Bound by"),
            ],
        )
        .add_params(alt.selection_point(name=PICK, fields=["key"], on="click", toggle=False))
    )
    return alt.layer(roof, marks).properties(height=400, padding=PADDING)
