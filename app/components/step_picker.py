"""Adding a step: the methods that fit the model, by kind, each with its one sentence."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import drafts
from app.compress_views import GROUP_TITLES, fitting, grouped
from app.text import esc
from core.registry import Method, Need


def step_picker(offers: frozenset[Need] | None, *, version: int) -> None:
    """A button that opens the list; a new ``version`` of the recipe closes it."""
    with st.popover("Add a step", icon=":material/add:", key=f"add_step_{version}", width="stretch"):
        groups = grouped(fitting(offers).values())
        titles: Any = {GROUP_TITLES[group]: members for group, members in groups.items()}
        chosen = st.segmented_control(
            "Kind of step",
            list(titles),
            default=next(iter(titles)),
            required=True,
            key="step_group",
            label_visibility="collapsed",
        )
        for method in titles.get(chosen, ()):
            _offer(method, version)


def _offer(method: Method, version: int) -> None:
    with st.container(gap=None):
        st.button(
            esc(method.title),
            icon=":material/add:",
            type="tertiary",
            key=f"add_{method.id}_{version}",
            on_click=drafts.add,
            args=(method.id,),
            kwargs={"version": version},
        )
        reads = " Reads calibration text." if "calibration" in method.needs else ""
        st.caption(esc(method.summary + reads))
