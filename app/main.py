"""Entry point: navigation, the model picker and the job toasts around every page."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app.state import model_picker

ROOT = Path(__file__).resolve().parents[1]


def page(name: str, title: str, icon: str, help: str, *, default: bool = False) -> st.Page:
    """One page of the navigation; its address is its file's name."""
    return st.Page(
        ROOT / "pages" / f"{name}.py",
        title=title,
        icon=f":material/{icon}:",
        url_path=None if default else name,
        default=default,
        help=help,
    )


st.set_page_config(page_icon=str(ROOT / "app" / "static" / "icon.png"), layout="wide")
navigation = st.navigation(
    [
        page("home", "Home", "home", "Open a model, see what was made of it", default=True),
        page("model", "Model", "deployed_code", "Where a model's parameters and bytes are"),
        page("inspect", "Inspect", "troubleshoot", "What a model computes, layer by layer"),
        page("compress", "Compress", "compress", "Make a smaller variant and prove that it reloads"),
        page("tradeoffs", "Trade-offs", "scatter_plot", "Size, quality and speed of every variant"),
        page("jobs", "Jobs", "manufacturing", "The queue: progress, logs, cancel and retry"),
    ],
    expanded=True,
)
with st.sidebar:
    model_picker()
navigation.run()
