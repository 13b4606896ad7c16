"""What pages share, kept in the address: the model that is looked at, and the cell that is picked on a map.

Widgets of one page name their own query parameters (``bind="query-params"``); this file owns the shared ones.
The session holds ids and short texts only, never frames or models.
"""

from __future__ import annotations

import streamlit as st

from app import engine
from core.models.demo import demos

DEFAULT_MODEL = "demo:smollm2"
_SEPARATOR = "~"


def known_models() -> dict[str, str]:
    """Sources that can be picked without typing, with their names: demos, then the catalog's bases and variants."""
    known = {f"demo:{name}": demo.title for name, demo in demos().items()}
    for variant in engine.catalog().variants():
        known.setdefault(variant.source, variant.name)
    return known


def model_picker() -> None:
    """Draw the model box of the sidebar. Anything may be typed into it."""
    known = known_models()
    st.selectbox(
        "Model",
        list(known),
        format_func=lambda source: known.get(source, source),
        key="model",
        bind="query-params",
        accept_new_options=True,
        required=True,
        help="Pick one, or type a hub id (org/name, optionally @revision), a folder, a .gguf file or variant:ID.",
    )


def model() -> str:
    """The source of the model that is looked at."""
    return st.session_state.get("model") or DEFAULT_MODEL


def choose_model(source: str) -> None:
    """Make ``source`` the model that is looked at; only from a callback, before the picker is drawn."""
    st.session_state["model"] = source


def picked_cell() -> tuple[str, str] | None:
    """Row and column key of the picked cell, as text; the page checks that they exist."""
    row, separator, col = st.query_params.get("cell", "").partition(_SEPARATOR)
    return (row, col) if separator else None


def pick_cell(row_key: object, col_key: object) -> None:
    """Put a cell into the address."""
    st.query_params["cell"] = f"{row_key}{_SEPARATOR}{col_key}"


def clear_cell() -> None:
    """Nothing is picked any more."""
    st.query_params.pop("cell", None)
