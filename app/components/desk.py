"""One page of questions put to a model: choose, ask, read the answer; what Inspect and Routing have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import streamlit as st

from app import state, stored
from app.components.artifact_picker import FIELD, artifact_picker
from app.components.asking import answer, answer_of_other, ask_ahead
from app.components.compare_panel import compare_panel, compare_picker, reference_picker
from app.components.empty_state import empty_state
from app.components.heading import About, Reproduction, heading
from app.components.prompt_box import example_row, prompt_box
from app.components.question_bar import misfit_note, probe_box, question_bar
from app.components.result_panel import result_panel
from app.components.weight_picker import weight_pickers
from app.engine import Question
from app.forms import settings_form
from app.reproduce import probe_command, probe_script
from app.text import esc
from core.models.sizes import ModelCard
from core.registry import Method, Settings
from core.types import Prompt, Result, Run


@dataclass(frozen=True)
class Asked:
    """What the desk's widgets say."""

    probe: Method
    prompt: Prompt | None
    settings: Settings | None
    """None after the form said what is wrong; likewise the prompt."""
    other: str | None
    """Source of a second model that is asked the same."""
    reference: str | None
    """Source of the original that a comparing probe holds the model against."""


def desk(
    probes: Mapping[str, Method],
    source: str,
    card: ModelCard,
    run: Run | None,
    *,
    first: str,
    facts: Callable[[ModelCard], None] | None = None,
    hide_unread: bool = False,
) -> None:
    """Draw the questions, the input and the answer.

    ``first`` is the probe that is asked when none was chosen; ``facts`` draws what is to be known of the model before;
    ``hide_unread`` leaves the prompt out where it is not read.
    """
    head = st.container()
    if facts is not None:
        facts(card)
    question_bar(probes, card, first)
    asked = _form(probes, source, card, first, hide_unread=hide_unread)
    if asked.settings is None or asked.prompt is None:
        head.title(esc(asked.probe.title), anchor=False)
        st.stop()
    probe, prompt, settings = asked.probe, asked.prompt, asked.settings
    with head:
        heading(
            f"{probe.title} of {state.model_name(source)}",
            about=About.of(probe),
            reproduce=Reproduction(
                probe_script(probe, source, card.folder, prompt, settings, asked.reference),
                probe_command(probe, source, prompt, settings, asked.reference),
            ),
        )
    if probe.takes_reference and asked.reference is None:
        empty_state(
            "This looks at a compressed copy beside its original. Open a variant on the left, or choose an original.",
            page="compress",
            action="Make a variant",
            icon="compare_arrows",
        )
        st.stop()
    _answer(Question.of(source, probe, prompt, settings, asked.reference), asked, card, run)


def _form(
    probes: Mapping[str, Method], source: str, card: ModelCard, first: str, *, hide_unread: bool
) -> Asked:
    """The probe, its input, its settings and a second model."""
    with st.container(border=True):
        left, right = st.columns(2, gap="medium")
        with left:
            what, beside = st.columns(2, gap="small")
            with what:
                probe = probe_box(probes, card, first)
        with beside:
            other = None if probe.takes_reference else compare_picker(source, card)
            reference = reference_picker(source, card) if probe.takes_reference else None
        with right:
            box, inputs = st.container(), st.container()
            example_row(probe, card.family)
        left.caption(esc(probe.summary))
        with left.container(horizontal=True, gap="small"):
            with st.popover("Settings", icon=":material/tune:"):
                own = {FIELD: lambda: artifact_picker(source, probe, card), **weight_pickers(probe, card)}
                settings = settings_form(probe, columns=2, inputs=inputs, own=own)
            misfit_note(probes, card)
        with box:
            read = settings is None or settings.reads_prompt
            hidden = hide_unread and not read
            prompt = Prompt() if hidden else prompt_box(card.family, ask_ahead, read=read)
    return Asked(probe, prompt, settings, other, reference)


def _answer(question: Question, asked: Asked, card: ModelCard, run: Run | None) -> None:
    """The answer, beside another model's where one is asked too."""
    assert asked.settings is not None
    result: Result | None
    if run is not None and stored.still(run, question):
        result = stored.reopened(run)
    else:
        result = answer(question, asked.probe, card, key="probe")
    other, second = asked.other, None
    if other is not None:
        second = answer_of_other(other, question, asked.probe, asked.settings)
    if result is not None and other is not None and second is not None:
        names = state.model_name(question.source), state.model_name(other)
        compare_panel(result, second, names=names, name=asked.probe.id, settings=asked.settings)
    elif result is not None:
        result_panel(result, name=asked.probe.id, settings=asked.settings)
