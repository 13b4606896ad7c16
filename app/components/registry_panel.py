"""The registry of devices as a table, and the user's own file laid over it, edited whole or not at all."""

from __future__ import annotations

import streamlit as st

from app import device_views
from app.components.card_head import card_head
from app.text import esc
from core.devices.registry import devices, published, user_file, write_user_file
from core.errors import BadInput

TEXT = "devices_yaml"
SAID = "devices_yaml_said"


def registry_panel() -> None:
    """The table, then the editor."""
    try:
        known, wrong = devices(), ""
    except BadInput as error:  # the user's file was edited by hand and does not read
        known, wrong = published(), str(error)
    frame = device_views.registry_table(known)
    column = st.column_config
    with st.container(border=True):
        card_head(f"{len(known)} devices", frame, None, key="registry")
        st.dataframe(
            frame,
            hide_index=True,
            height=460,
            key="registry_table",
            alt="Every device with its figures, their source and how sure they are",
            column_config={
                "slug": None,
                "name": column.TextColumn("Device", pinned=True, width="medium"),
                "kind": "Kind",
                "own": column.CheckboxColumn("Yours", width=60),
                "memory": column.NumberColumn("Memory GiB", format="%.3g"),
                "usable": column.NumberColumn("For models GiB", format="%.3g"),
                "bandwidth": column.NumberColumn(
                    "GB/s", format="%.4g", help="theoretical peak of the memory that the engine reads"
                ),
                "fp16": column.NumberColumn("fp16 TFLOP/s", format="%.3g", help="dense peak"),
                "int8": column.NumberColumn("int8 TOP/s", format="%.3g", help="dense peak"),
                "power": "Power",
                "engines": column.TextColumn("Engines", width="small"),
                "confidence": column.TextColumn(
                    "Sure", help="high: a vendor's figure; medium: derived; low: a guess"
                ),
                "rates": column.NumberColumn(
                    "Published rates", help="figures of language models in the track record"
                ),
                "source": column.TextColumn("Source", width="medium"),
                "as_of": "As of",
                "note": "Note",
                "reached": "Reached by",
            },
        )
    with st.container(border=True):
        _editor(wrong)


def _editor(wrong: str) -> None:
    path = user_file()
    if TEXT not in st.session_state:
        st.session_state[TEXT] = path.read_text(encoding="utf-8") if path.is_file() else device_views.EXAMPLE
    st.header("Your devices", anchor=False)
    st.caption(
        esc(
            f"Laid over the table; kept beside the catalog in {path.name}. An entry with like: starts from a published device."
        )
    )
    if wrong:
        st.markdown(f":red[{esc(wrong)}]")
    st.text_area("Devices as YAML", key=TEXT, height=260, label_visibility="collapsed")
    with st.container(horizontal=True, vertical_alignment="center"):
        kind, said = st.session_state.pop(SAID, ("", ""))
        st.markdown(
            f":{kind}[{esc(said)}]" if said else ":gray[Checked as a whole before anything is written.]",
            width="stretch",
        )
        st.button("Save", icon=":material/save:", on_click=_save, key="devices_save")


def _save() -> None:
    try:
        own = write_user_file(st.session_state[TEXT])
        st.session_state[SAID] = ("green", f"saved: {', '.join(own) or 'no device'}")
    except (BadInput, OSError) as error:
        st.session_state[SAID] = ("red", f"nothing was written: {error}")
