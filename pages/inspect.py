"""What a model computes on one input: a question, the probe that answers it, and every number of it in the address."""

from __future__ import annotations

import streamlit as st

from app import engine, state, stored
from app.components.artifact_picker import FIELD, artifact_picker
from app.components.asking import answer, answer_of_other, ask_ahead
from app.components.compare_panel import compare_panel, compare_picker, reference_picker
from app.components.empty_state import empty_state
from app.components.error_card import error_card
from app.components.heading import About, Reproduction, heading
from app.components.prompt_box import example_row, prompt_box
from app.components.question_bar import misfit_note, probe_box, question_bar
from app.components.result_panel import result_panel
from app.components.waiting import settled
from app.engine import Question
from app.forms import settings_form
from app.reproduce import probe_command, probe_script
from app.text import esc
from core.errors import SlimscopeError
from core.registry import methods

# --- the model, and a stored run if the address names one ------------------------------------------------
top = st.container()
try:
    run = stored.take_up_run()
    if run is not None and run.kind == "train":
        stored.training(run)
        st.stop()
    source = state.model()
    opening = engine.open_model(source)
except SlimscopeError as error:
    top.title("Inspect", anchor=False)
    error_card(error, key="inspect_source", retry=stored.forget if st.query_params.get("run") else None)
    st.stop()
card = settled(opening, key="open")
if card is None:
    top.title(esc(f"Opening {source}"), anchor=False)
    st.stop()

# --- what is asked ---------------------------------------------------------------------------------------
probes = methods("probe")
with top:
    head = st.container()
    question_bar(probes, card)
with st.container(border=True):
    left, right = st.columns(2, gap="medium")
    with left:
        what, beside = st.columns(2, gap="small")
        with what:
            probe = probe_box(probes, card)
    with beside:
        other = None if probe.takes_reference else compare_picker(source, card)
        reference = reference_picker(source, card) if probe.takes_reference else None
    with right:
        prompt = prompt_box(card.family, ask_ahead)
        inputs = st.container()
        example_row(probe, card.family)
    left.caption(esc(probe.summary))
    with left.container(horizontal=True, gap="small"):
        with st.popover("Settings", icon=":material/tune:"):
            own = {FIELD: lambda: artifact_picker(source, probe, card)}
            settings = settings_form(probe, columns=2, inputs=inputs, own=own)
        misfit_note(probes, card)
if settings is None or prompt is None:
    head.title(esc(probe.title), anchor=False)
    st.stop()
with head:
    heading(
        f"{probe.title} of {state.model_name(source)}",
        about=About.of(probe),
        reproduce=Reproduction(
            probe_script(probe, source, card.folder, prompt, settings, reference),
            probe_command(probe, source, prompt, settings, reference),
        ),
    )

# --- the answer ------------------------------------------------------------------------------------------
if probe.takes_reference and reference is None:
    empty_state(
        "This looks at a compressed copy beside its original. Open a variant on the left, or choose an original.",
        page="compress",
        action="Make a variant",
        icon="compare_arrows",
    )
    st.stop()
question = Question.of(source, probe, prompt, settings, reference)
if run is not None and stored.still(run, question):
    result = stored.reopened(run)
else:
    result = answer(question, probe, card, key="probe")
second = None if other is None else answer_of_other(other, question, probe, settings)
if result is not None and second is not None:
    names = (state.model_name(source), state.model_name(str(other)))
    compare_panel(result, second, names=names, name=probe.id, settings=settings)
elif result is not None:
    result_panel(result, name=probe.id, settings=settings)
