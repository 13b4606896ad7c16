"""Numbers that other programs measured, brought in as tier D; and the lines that a file of ours left on a device."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pandas as pd
import streamlit as st

from app import engine, state
from app import format as fmt
from app.components.card_head import card_head
from app.components.error_card import error_card
from app.text import esc
from core.devices.remote import import_result
from core.errors import SlimscopeError
from core.importing import READERS, import_report
from core.types import Run

MOST_MB = 64
NONE = "none"


def import_panel() -> None:
    """The upload, what it belongs to, and everything that came in this way."""
    with st.container(border=True):
        st.header("A report of another program", anchor=False)
        st.caption(
            esc(
                "Read: "
                + "; ".join(str(reader.EXPECTED) for reader in READERS)
                + "; or the lines of a Slimscope file that ran on a device."
            )
        )
        newest = engine.newest_models(engine.revision())
        titles = {NONE: "a model that is not here"} | dict(
            zip(newest["id"].astype(str), newest["name"], strict=True)
        )
        variant = state.choice(st.selectbox, "It measured", titles, key="of", default=NONE)
        name = st.text_input(
            "Called", key="called", placeholder="by the file's name", disabled=variant != NONE
        )
        uploaded = st.file_uploader(
            "Report",
            type=["json", "jsonl", "yaml", "yml"],
            key="report",
            max_upload_size=MOST_MB,
            label_visibility="collapsed",
        )
        if uploaded is not None and st.button("Bring it in", icon=":material/upload:", key="import_now"):
            _bring_in(uploaded.name, uploaded.getvalue(), None if variant == NONE else variant, name.strip())
    runs: list[Run] = st.session_state.get("imported", [])
    if runs:
        _shown(runs)


def _bring_in(file: str, content: bytes, variant: str | None, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(file).name
        path.write_bytes(content)
        try:
            catalog = engine.writable_catalog()
            if _is_ours(content):
                st.session_state["imported"] = [import_result(catalog, path)]
            else:
                st.session_state["imported"] = import_report(
                    catalog, path, variant=variant, name=name or None
                )
        except SlimscopeError as error:
            st.session_state["imported"] = []
            error_card(error, key="import_error")


def _is_ours(content: bytes) -> bool:
    """Whether these are the lines that a file of ours left: the first one tells what was asked."""
    try:
        first = json.loads(content.split(b"\n", 1)[0])
    except ValueError:
        return False
    return isinstance(first, dict) and "spec" in first


def _shown(runs: list[Run]) -> None:
    rows = [
        (run.protocol, m.name, m.value, m.unit, fmt.interval(m.low, m.high), m.n)
        for run in runs
        for m in run.measurements
    ]
    frame = pd.DataFrame(rows, columns=["protocol", "measurement", "value", "unit", "interval", "n"])
    with st.container(border=True):
        card_head(f"Brought in: {len(runs)} run{'s' * (len(runs) != 1)}", frame, None, key="imported-rows")
        st.markdown(":orange-badge[badge D] measured elsewhere: shown beside our own, never a verdict")
        st.dataframe(frame, hide_index=True, key="imported_table", alt="What the report said")
