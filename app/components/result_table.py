"""A frame of a Result as a table; a click on a row may pick what the row is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import streamlit as st
from pandas.api.types import is_float_dtype

from app.charts import MARK_LIMIT, titled
from app.text import esc
from app.views import reading_order
from core.types import View

TALL = 8
"""A table with more rows scrolls inside itself."""


def result_table(
    frame: pd.DataFrame, view: View, *, key: str, on_row: Callable[[pd.Series], None] | None = None
) -> None:
    """The columns of a view as a table, headers in words and numbers to four digits.

    ``on_row`` gets the clicked row of ``frame``, with all its columns.
    """
    most = MARK_LIMIT // max(1, len(view.columns))
    rows = frame.head(most)
    shown = rows[[column for column in reading_order(view) if column in frame]]
    config = {
        column: st.column_config.NumberColumn(titled(column, view), format="%.4g")
        if is_float_dtype(shown[column])
        else st.column_config.Column(titled(column, view))
        for column in shown.columns
    }
    clickable: dict[str, Any] = {}
    if on_row is not None:

        def picked() -> None:
            chosen = st.session_state[key]["selection"]["rows"]
            if chosen and chosen[0] < len(rows):
                on_row(rows.iloc[chosen[0]])

        clickable = {"on_select": picked, "selection_mode": "single-row"}
    st.dataframe(
        shown,
        hide_index=True,
        column_config=config,
        key=key,
        height=320 if len(rows) > TALL else "content",
        alt=view.title or "Values",
        **clickable,
    )
    if len(rows) < len(frame):
        st.caption(esc(f"The first {len(rows):,} of {len(frame):,} rows; the CSV holds all of them."))
