"""The first line of a card: its title, whatever the card puts beside it, and the export of what it shows."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from app.components.export_menu import export_menu
from app.text import esc


def card_head(title: str, frame: pd.DataFrame, chart: Any | None, *, key: str) -> None:
    """Draw ``title`` (plain text) and the export of ``frame`` and ``chart``; ``key`` names widgets and files."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.header(esc(title), anchor=False, width="stretch")
        export_menu(frame, chart, name=key, key=key)
