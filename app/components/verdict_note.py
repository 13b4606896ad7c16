"""What must be said of a variant, beside it: that it is slower, broken, larger or no smaller than its base."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from app.text import esc


def verdict_note(said: Sequence[str]) -> None:
    """One line per sentence; nothing where nothing speaks against the variant."""
    for sentence in said:
        st.markdown(f":orange[:material/warning: {esc(sentence)}]")
