"""A frame of a Result as a table."""

from __future__ import annotations

from typing import Literal

import pandas as pd
import streamlit as st
from pandas.api.types import is_float_dtype

from app.charts import titled
from core.types import View


def result_table(
    frame: pd.DataFrame, view: View, *, key: str, height: int | Literal["content"] = 320
) -> None:
    """A frame as a table with headers in words and numbers to four digits."""
    config = {
        column: st.column_config.NumberColumn(titled(column, view), format="%.4g")
        if is_float_dtype(frame[column])
        else st.column_config.Column(titled(column, view))
        for column in frame.columns
    }
    st.dataframe(
        frame, hide_index=True, column_config=config, key=key, height=height, alt=view.title or "Values"
    )
