"""The export of one picture: its data as CSV, and the chart as PNG or SVG, drawn only when asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from app.export import PICTURES, picture


def export_menu(
    frame: pd.DataFrame | Callable[[], pd.DataFrame], chart: Any | None, *, name: str, key: str
) -> None:
    """Draw a small popover of downloads named ``name``; without a chart only the data is offered.

    A frame that costs something to make is given as a function, called when it is asked for.
    """
    with st.popover("Export", icon=":material/download:", type="tertiary", key=f"{key}_export"):
        st.download_button(
            "Data (CSV)",
            lambda: (frame() if callable(frame) else frame).to_csv(index=False),
            f"{name}.csv",
            "text/csv",
            key=f"{key}_csv",
            on_click="ignore",
            width="stretch",
        )
        if chart is None:
            return
        for kind, mime in PICTURES.items():
            st.download_button(
                f"Picture ({kind.upper()})",
                partial(picture, chart, kind),
                f"{name}.{kind}",
                mime,
                key=f"{key}_{kind}",
                on_click="ignore",
                width="stretch",
            )
