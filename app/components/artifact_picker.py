"""Choosing what was trained for a model, where a probe needs it, and training one where there is none."""

from __future__ import annotations

import streamlit as st

from app import engine, state
from app import format as fmt
from app.components.asking import words
from app.components.job_card import live_jobs
from app.forms import settings_form
from app.text import esc
from core.errors import SlimscopeError
from core.estimate import estimate
from core.jobs.plan import submit_train
from core.jobs.states import ACTIVE
from core.models.sizes import ModelCard
from core.registry import Method, Settings, methods
from core.types import ModelRef, Run

NONE = "none"
PASS_TOKENS = 256
"""The forward passes of a training's cost are taken over about so many tokens."""
FIELD = "artifact"
"""The setting by which a probe asks for something trained."""


def trainers_of(probe: Method, card: ModelCard) -> list[Method]:
    """The training methods whose artifacts a probe takes: those its field names, else the one of its own id, else all."""
    known = {id_: m for id_, m in methods("train").items() if m.needs - {"calibration"} <= card.offers}
    extra = probe.settings.model_fields[FIELD].json_schema_extra
    named = extra.get("trained_by") if isinstance(extra, dict) else None
    if isinstance(named, str) and named in known:
        return [known[named]]
    return [known[probe.id]] if probe.id in known else list(known.values())


def artifact_picker(source: str, probe: Method, card: ModelCard) -> str:
    """Draw the choice among the trainings that fit this model, and the form that queues one; returns a hash or ''."""
    trainers = trainers_of(probe, card)
    ids = {trainer.id for trainer in trainers}
    base = engine.base_of(source, card.fingerprint)
    runs = [r for r in engine.trained(base, engine.revision()) if r.conditions.get("method") in ids]
    titles = {run.conditions["artifact"]: _title(run) for run in reversed(runs)}
    newest = runs[0].conditions["artifact"] if runs else NONE
    key = f"{probe.id}_{FIELD}"
    if not st.query_params.get(key) and not st.session_state.get(key):
        st.session_state.pop(key, None)
    chosen = state.choice(
        st.selectbox,
        "Trained on this model",
        {NONE: "nothing yet: train one" if not runs else "none"} | titles,
        key=key,
        default=newest,
        accept_new_options=True,
        help="Made by a training job or by slimscope train; a hash or a folder may be typed",
    )
    with st.popover("Train one", icon=":material/model_training:", type="tertiary"):
        _train_form(source, trainers, card)
    spec_model = ModelRef.parse(source).located
    jobs = [
        job
        for job in engine.queue().jobs(50)
        if job.kind == "train" and job.state in ACTIVE and job.spec.get("model") == spec_model
    ]
    if jobs:
        live_jobs(jobs, prefix="training")
    return "" if chosen == NONE else chosen


def _title(run: Run) -> str:
    facts = run.conditions.get("settings", {})
    layer = f", layer {facts['layer']}" if "layer" in facts else ""
    return f"{fmt.label(run.conditions['method'])}{layer}, {fmt.ago(run.ended_at)} ({run.conditions['artifact'][:8]})"


def _train_form(source: str, trainers: list[Method], card: ModelCard) -> None:
    """The settings of a training method, the text, and the button that queues it."""
    if not trainers:
        st.caption("No training method of this version fits this model.")
        return
    method = trainers[0]
    if len(trainers) > 1:
        titles = {trainer.id: trainer.title for trainer in trainers}
        id_ = state.choice(st.selectbox, "Method", titles, key="train", default=method.id)
        method = next(trainer for trainer in trainers if trainer.id == id_)
    st.caption(esc(method.summary))
    settings = settings_form(method, prefix=f"train_{method.id}", columns=2)
    text = st.text_input(
        "Text to train on",
        "pydoc",
        key="train_text",
        bind="query-params",
        help="pydoc (the reference prose every Python ships), a text file's path, or hub:ID",
    )
    if settings is not None and card.pace is not None:
        told = estimate(method, card.anatomy, card.pace, PASS_TOKENS, settings)
        st.caption(esc(f"{words(told)} on this machine when it does nothing else"))
    st.button(
        "Train as a job",
        icon=":material/manufacturing:",
        disabled=settings is None,
        key="train_start",
        on_click=_start,
        args=(source, method, settings, text),
    )
    if refusal := st.session_state.pop("train_refusal", None):
        st.markdown(f":red[{esc(refusal)}]")


def _start(source: str, method: Method, settings: Settings, text: str) -> None:
    try:
        values = settings.model_dump(mode="json")
        submit_train(engine.queue(), model=source, method=method.id, text=text, settings=values)
        engine.start_work()
    except SlimscopeError as error:
        st.session_state["train_refusal"] = str(error)
