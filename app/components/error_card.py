"""What went wrong, in one sentence, with the next move; never a stack trace, never a dead page."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app.text import esc
from core.errors import AnatomyMismatch, CannotMeasure, CannotOpen, OutOfMemory, SlimscopeError, WorkerDied

TITLES: dict[type[SlimscopeError], str] = {
    OutOfMemory: "Out of memory",
    WorkerDied: "The inspector stopped",
    AnatomyMismatch: "This model is not understood",
    CannotOpen: "The model cannot be opened",
    CannotMeasure: "That cannot be measured",
}


def error_card(error: SlimscopeError, *, key: str, retry: Callable[[], None] | None = None) -> None:
    """Draw ``error`` as a bordered card; ``retry`` becomes a "Try again" button that reruns the page."""
    title = next((TITLES[kind] for kind in type(error).__mro__ if kind in TITLES), "That did not work")
    with st.container(border=True, key=key, gap="small"):
        st.markdown(f":red[:material/error:] **{title}**")
        st.markdown(esc(str(error)))
        if retry is not None:
            st.button("Try again", icon=":material/refresh:", on_click=retry, key=f"{key}_retry")
