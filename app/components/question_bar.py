"""Choosing what to ask: a question first, then one of the probes that answer it; and what does not fit this model."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from app import questions
from app.components.prompt_box import take_up
from app.text import esc
from core.models.sizes import ModelCard
from core.registry import Method


def wanted(probes: Mapping[str, Method], card: ModelCard, first: str) -> Method:
    """The probe that the address or this session asks for, if this model can have it; else the first."""
    usable = questions.usable(probes, card.offers)
    id_ = st.query_params.get("probe") or st.session_state.get("probe") or ""
    return usable.get(id_) or questions.first_of(usable, first)


def question_bar(probes: Mapping[str, Method], card: ModelCard, first: str) -> None:
    """The questions that this model can be asked, as one row; choosing one goes to its first probe.

    Nothing is drawn where there is only one.
    """
    offered = questions.by_question(questions.usable(probes, card.offers).values())
    now = questions.question_of(wanted(probes, card, first))
    st.session_state["question"] = now
    if len(offered) == 1:
        return

    def choose() -> None:
        question = st.session_state["question"]
        if question and question != now:
            go_to(offered[question][0], card)

    st.segmented_control(
        "Question",
        list(offered),
        key="question",
        required=True,
        on_change=choose,
        label_visibility="collapsed",
    )


def probe_box(probes: Mapping[str, Method], card: ModelCard, first: str) -> Method:
    """The probes that answer the question; returns the chosen one."""
    usable = questions.usable(probes, card.offers)
    now = wanted(probes, card, first)
    among = questions.by_question(usable.values())[questions.question_of(now)]
    st.session_state["probe"] = now.id

    def choose() -> None:
        go_to(usable[st.session_state["probe"]], card)

    st.selectbox(
        "Probe",
        [probe.id for probe in among],
        format_func=lambda id_: usable[id_].title,
        key="probe",
        persist_state="session",
        on_change=choose,
    )
    if now.id != questions.first_of(usable, first).id:
        st.query_params["probe"] = now.id  # kept from another page: the address shows it again
    return now


def go_to(probe: Method, card: ModelCard) -> None:
    """Ask with another probe; only from a callback."""
    st.query_params["probe"] = st.session_state["probe"] = probe.id
    st.query_params.pop("cell", None)
    take_up(probe, card.family)


def misfit_note(probes: Mapping[str, Method], card: ModelCard) -> None:
    """The probes that are not for this model, with the reason, behind one small button."""
    table = questions.misfits(probes, card.offers)
    if table.empty:
        return
    with st.popover(f"Not for this model ({len(table)})", type="tertiary", icon=":material/block:"):
        for row in table.itertuples():
            st.caption(esc(f"{row.probe} needs {row.needs}."))
