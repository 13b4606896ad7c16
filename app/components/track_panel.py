"""What predictions are worth: every published rate beside what would have been said without its device."""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import streamlit as st

from app import device_charts, device_views, measurements, state
from app.components.card_head import card_head
from core.predict.track_record import by_class, median_error

GOAL = 0.16
"""Median absolute error that was promised, leaving one device out."""


def track_panel() -> None:
    """The errors at the top, the picture, by class, and every figure."""
    titles = {"device": "Its device left out", "chip": "Its chip left out"}
    chosen = state.choice(
        st.segmented_control, "Held out", titles, key="held", default="device", required=True
    )
    record = measurements.held_out("chip" if chosen == "chip" else "device")
    prefill = record["prefill_error"].notna()
    with st.grid(4, min_column_width=150, gap="small"):
        st.metric(
            "Median error of decode", f"{median_error(record):.1%}", border=True, height="stretch",
            delta=f"goal {GOAL:.0%}" if chosen == "device" else "no goal", delta_color="off", delta_arrow="off",
            delta_description=f"{len(record)} published rates",
        )  # fmt: skip
        st.metric(
            "Median error of prefill", f"{median_error(record[prefill], 'prefill_error'):.1%}", border=True, height="stretch",
            delta=f"{int(prefill.sum())} rates", delta_color="off", delta_arrow="off", delta_description="published",
        )  # fmt: skip
        st.metric(
            "Inside the band", f"{record['inside'].mean():.0%}", border=True, height="stretch",
            delta="nominal 90%", delta_color="off", delta_arrow="off", delta_description="without it",
        )  # fmt: skip
        flagged = int((record["flag"] != "").sum())
        st.metric(
            "Physically suspicious", flagged, border=True, height="stretch", delta="> 1 or < 0.05",
            delta_color="off", delta_arrow="off", delta_description="of bandwidth",
        )  # fmt: skip
    chart = device_charts.record(record)
    left, right = st.columns([1.2, 1], gap="small")
    with left.container(border=True, height="stretch"):
        card_head("Published against predicted", record, chart, key="track-record")
        st.altair_chart(
            chart, key="record_chart", alt="Published rates against predictions made without their device"
        )
        st.caption("On the dashed line the prediction is perfect; hollow points lie outside their band.")
    with right.container(border=True, height="stretch"):
        classes = by_class(record)
        card_head("By class", classes, None, key="track-classes")
        _percent(classes, "classes_table", "Errors by class of device")
    with st.container(border=True):
        card_head("Every figure, the worst first", device_views.record_table(record), None, key="track-rows")
        _percent(
            device_views.record_table(record),
            "record_table",
            "Every published figure with its prediction",
            height=400,
        )


def _percent(
    frame: pd.DataFrame, key: str, alt: str, *, height: Literal["content"] | int = "content"
) -> None:
    column = st.column_config
    shares = ("median_error", "p90_error", "inside", "prefill_median_error", "error", "share")
    titles = {"engine": "Class", "n": "n", "name": "Device", "median_error": "Median", "p90_error": "p90", "inside": "Inside band",
              "prefill_n": "Prefill n", "prefill_median_error": "Prefill", "error": "Off by", "share": "Of bandwidth"}  # fmt: skip
    config: dict[str, Any] = {name: titles.get(name, name.capitalize()) for name in frame.columns}
    config |= {
        name: column.NumberColumn(titles[name], format="percent")
        for name in shares
        if name in frame and frame[name].dtype.kind == "f"
    }
    config |= {
        name: column.NumberColumn(name.capitalize(), format="%.3g")
        for name in ("published", "predicted")
        if name in frame
    }
    st.dataframe(frame, hide_index=True, height=height, key=key, alt=alt, column_config=config)
