"""Trade-offs narrowed to variants that were made together: a sweep's ladder, as a link."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app import engine
from app.components.tradeoff_board import clear_brush
from core.errors import BadInput


def among() -> list[str]:
    """The variants that the address narrows the page to; empty for all."""
    return [id_ for id_ in st.query_params.get("among", "").split(",") if id_]


def among_line(frame: pd.DataFrame) -> None:
    """Which variants are left out, and the button that brings them back."""

    def show_all() -> None:
        st.query_params.pop("among", None)
        clear_brush()

    n = int(frame["recipe"].notna().sum())
    with st.container(horizontal=True, vertical_alignment="center"):
        st.markdown(f":gray[Only {n} variants made together, and their base.]", width="stretch")
        st.button("Show all variants", icon=":material/close:", on_click=show_all, key="show_all")


def base_of(variants: list[str]) -> str | None:
    """The base of variants that an address names; None where the first is none."""
    try:
        return engine.variant_of(variants[0]).base_id if variants else None
    except BadInput:
        return None
