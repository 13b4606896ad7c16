"""What went wrong, in one sentence, with the next move; never a stack trace, never a dead page."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app.text import esc
from core.errors import (
    AnatomyMismatch,
    CannotMeasure,
    CannotOpen,
    NeedsInput,
    OutOfMemory,
    SlimscopeError,
    WorkerDied,
)

TITLES: dict[type[SlimscopeError], str] = {
    OutOfMemory: "Out of memory",
    WorkerDied: "The inspector stopped",
    AnatomyMismatch: "This model is not understood",
    CannotOpen: "The model cannot be opened",
    CannotMeasure: "That cannot be measured",
    NeedsInput: "One more input",
}


def error_card(error: SlimscopeError, *, key: str, retry: Callable[[], None] | None = None) -> None:
    """Draw ``error`` as a bordered card; ``retry`` becomes a "Try again" button that reruns the page.

    What only asks for an input is no failure: it is said calmly, and trying again would change nothing.
    """
    title = next((TITLES[kind] for kind in type(error).__mro__ if kind in TITLES), "That did not work")
    with st.container(border=True, key=key, gap="small"):
        asks = isinstance(error, NeedsInput)
        st.markdown(f":material/edit: **{title}**" if asks else f":red[:material/error:] **{title}**")
        st.markdown(esc(str(error)[:1].upper() + str(error)[1:]) if asks else esc(str(error)))
        if retry is not None and not asks:
            st.button("Try again", icon=":material/refresh:", on_click=retry, key=f"{key}_retry")
