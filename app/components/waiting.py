"""Waiting for the inspector without blocking the page: at once if it is warm, else progress with time left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from app import format
from app.components.error_card import error_card
from app.engine import Call
from app.text import esc
from core.errors import SlimscopeError

if TYPE_CHECKING:
    from core.inspector import Ticket, TicketProgress

INLINE_WAIT_S = 0.8
"""An unknown call may be answered within this, and then the page is drawn in one go instead of twice."""
PATIENCE_S = 1.8
"""The same for a call that took less than this the last time."""
POLL_S = 0.25


def settled(call: Call, *, key: str, cancel: bool = False) -> Any | None:
    """The call's result, or None after drawing its progress or its error; the page reruns when the call ends.

    ``cancel`` puts a button beside the progress that gives the call up.
    """
    took = call.ticket.progress.estimate_s
    patience = PATIENCE_S if took is not None and took < PATIENCE_S else INLINE_WAIT_S
    try:
        return call.ticket.result(timeout=patience)
    except TimeoutError:
        st.fragment(
            lambda: _progress(call.ticket, call.expected_s, key if cancel else None), run_every=POLL_S
        )()
    except SlimscopeError as error:
        error_card(error, key=f"{key}_error", retry=call.again)
    return None


def _progress(ticket: Ticket, guess_s: float | None, cancel_key: str | None) -> None:
    if ticket.done:
        st.rerun()
    fraction, text = progress_line(ticket.progress, guess_s)
    with st.container(border=True, horizontal=cancel_key is not None, vertical_alignment="center"):
        st.progress(fraction, text=text)
        if cancel_key is not None:
            st.button(
                "Cancel",
                icon=":material/close:",
                type="tertiary",
                key=f"{cancel_key}_cancel",
                on_click=ticket.cancel,
            )


def progress_line(progress: TicketProgress, guess_s: float | None) -> tuple[float, str]:
    """How far a call is, 0–1, and the sentence beside the bar, as Markdown."""
    expected = progress.estimate_s or guess_s
    by_steps = progress.done / progress.total if progress.total else 0.0
    by_time = progress.elapsed_s / expected if expected else 0.0
    fraction = min(0.97, max(by_steps, by_time))
    message = esc(progress.message[:1].upper() + progress.message[1:])
    if by_steps > 0.05:
        left = progress.elapsed_s * (1 - by_steps) / by_steps
    elif expected:
        left = expected - progress.elapsed_s
    else:
        return fraction, f"{message} · {format.seconds(progress.elapsed_s)} so far"
    return fraction, f"{message} · " + (f"about {format.seconds(left)} left" if left > 1 else "a moment more")
