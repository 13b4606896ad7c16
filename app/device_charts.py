"""The charts of the Devices page: predicted rates with their bands, and predictions against what was published. No Streamlit."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from app.charts import PADDING

NEUTRAL = "#8A93A6"
_LOG: dict[str, Any] = {"grid": False, "format": "~g", "labelOverlap": "parity"}


def bands(frame: pd.DataFrame) -> Any:
    """One row per device: the predicted rate in its band; columns of ``device_views.bands``."""
    order = frame["name"].tolist()
    scale = alt.Scale(type="log", nice=False, padding=10)
    y = alt.Y("name:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=260))
    x = alt.X("decode:Q", title="Predicted tokens/s, log", scale=scale, axis=alt.Axis(**_LOG))
    low = x.copy()
    low.shorthand = "low:Q"
    tips = [
        alt.Tooltip("name:N", title="Device"),
        alt.Tooltip("decode:Q", title="Predicted tok/s", format=".3~g"),
        alt.Tooltip("low:Q", title="9 of 10 from", format=".3~g"),
        alt.Tooltip("high:Q", title="to", format=".3~g"),
        alt.Tooltip("told:N", title="How"),
    ]
    color = alt.Color("kind:N", legend=alt.Legend(orient="top", title=None, columns=5, symbolOpacity=1))
    rules = (
        alt.Chart(frame)
        .mark_rule(strokeWidth=5, opacity=0.35)
        .encode(x=low, x2="high:Q", y=y, color=color, tooltip=tips)
    )
    points = (
        alt.Chart(frame)
        .mark_point(filled=True, size=60, opacity=1)
        .encode(x=x, y=y, color=color, tooltip=tips)
    )
    return alt.layer(rules, points).properties(height=110 + 20 * len(frame), padding=PADDING)


def record(frame: pd.DataFrame) -> Any:
    """Every published rate against what was predicted without its device; the line is a perfect prediction."""
    ends = [
        float(frame[["published", "predicted"]].min().min()) / 1.3,
        float(frame[["published", "predicted"]].max().max()) * 1.3,
    ]
    scale = alt.Scale(type="log", nice=False, domain=ends)
    x = alt.X("predicted:Q", title="Predicted tokens/s, log", scale=scale, axis=alt.Axis(**_LOG))
    y = alt.Y("published:Q", title="Published tokens/s, log", scale=scale, axis=alt.Axis(**_LOG))
    line = (
        alt.Chart(pd.DataFrame({"predicted": ends, "published": ends}))
        .mark_line(color=NEUTRAL, strokeDash=[5, 3])
        .encode(x=x, y=y)
    )
    points = (
        alt.Chart(frame)
        .mark_point(filled=True, size=52, opacity=0.85, strokeWidth=1.3)
        .encode(
            x=x,
            y=y,
            color=alt.Color("engine:N", legend=alt.Legend(orient="right", title="Class")),
            fillOpacity=alt.when("datum.inside").then(alt.value(0.85)).otherwise(alt.value(0)),
            stroke=alt.Stroke("engine:N", legend=None),
            tooltip=[
                alt.Tooltip("name:N", title="Device"),
                alt.Tooltip("model:N", title="Model"),
                alt.Tooltip("format:N", title="Format"),
                alt.Tooltip("published:Q", title="Published", format=".3~g"),
                alt.Tooltip("predicted:Q", title="Predicted", format=".3~g"),
                alt.Tooltip("error:Q", title="Off by", format="+.0%"),
                alt.Tooltip("source:N", title="Source"),
            ],
        )
    )
    return alt.layer(line, points).properties(height=380, padding=PADDING)
