"""What all pages share, kept in the address: the model that is looked at.

Every other bound widget names its own query parameter; this file owns the shared ones. Nothing heavy is ever
put into the session's state, only ids.
"""

from __future__ import annotations

import streamlit as st
from core.models.demo import demos

from app import engine

DEFAULT_MODEL = "demo:smollm2"


def known_models() -> dict[str, str]:
    """Sources a user can pick without typing, with their names: demos, then the catalog's bases and variants."""
    known = {f"demo:{name}": demo.title for name, demo in demos().items()}
    for variant in engine.catalog().variants():
        known.setdefault(variant.source, variant.name)
    return known


def model_picker() -> str:
    """Draw the model box of the sidebar; return the source it names. Anything may be typed."""
    known = known_models()
    return st.selectbox(
        "Model",
        list(known),
        format_func=lambda source: known.get(source, source),
        key="model",
        bind="query-params",
        accept_new_options=True,
        help="Pick one, or type a hub id (org/name, optionally @revision), a folder, a .gguf file or variant:ID.",
    )


def model() -> str:
    """The source of the model that is looked at."""
    return st.session_state.get("model") or DEFAULT_MODEL
