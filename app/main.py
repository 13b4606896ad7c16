"""Entry point: navigation, the model picker and the news of jobs around every page."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app.components.job_card import job_toasts
from app.state import model_picker

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    ("home", "Home", "home", "Open a model, see what was made of it"),
    ("model", "Model", "deployed_code", "Where a model's parameters and bytes are"),
    ("formats", "Formats", "pin", "What a number can hold, and what a format would make of the weights"),
    ("inspect", "Inspect", "troubleshoot", "What a model computes, layer by layer"),
    (
        "routing",
        "Routing",
        "alt_route",
        "Which expert of a mixture does what, and what if it routed otherwise",
    ),
    ("compress", "Compress", "compress", "Make a smaller variant and prove that it reloads"),
    ("distil", "Distil", "school", "Train a smaller student from a teacher, beside its honest baselines"),
    ("tradeoffs", "Trade-offs", "scatter_plot", "Size, quality and speed of every variant"),
    ("profile", "Profile", "speed", "How fast each variant is in each runtime, at what loss, and why"),
    (
        "devices",
        "Devices",
        "developer_board",
        "On which devices a model fits, predicted, and your own to measure on",
    ),
    ("jobs", "Jobs", "manufacturing", "The queue: progress, logs, cancel and retry"),
)
"""File name (and address), title, icon and help of every page; the first is the start page."""

st.set_page_config(page_icon=str(ROOT / "app" / "static" / "icon.png"), layout="wide")
navigation = st.navigation(
    [
        st.Page(
            ROOT / "pages" / f"{name}.py",
            title=title,
            icon=f":material/{icon}:",
            url_path=None if name == "home" else name,
            default=name == "home",
            help=help,
        )
        for name, title, icon, help in PAGES
    ],
    expanded=True,
)
with st.sidebar:
    model_picker()
    job_toasts()
navigation.run()
