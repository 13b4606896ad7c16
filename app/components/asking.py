"""Asking a probe: at once when it is quick; else its cost first, then now or as a job; stored answers as they are."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from app import engine
from app import format as fmt
from app.components.error_card import error_card
from app.components.job_card import live_jobs
from app.components.waiting import settled
from app.engine import Question
from app.text import esc
from core.errors import SlimscopeError
from core.estimate import Estimate, estimate
from core.jobs.plan import probe_spec, submit_probe
from core.jobs.states import ACTIVE
from core.models.sizes import ModelCard
from core.registry import Method, Settings, get
from core.types import Job, Result

AT_ONCE_S = 2.0
"""What is expected to take longer needs a click."""


def answer(question: Question, probe: Method, card: ModelCard, *, key: str) -> Result | None:
    """The probe's result, or None after drawing what there is instead: its cost, its progress, its job, its error."""
    if engine.was_asked(question):
        return settled(engine.probe(question), key=key, cancel=True)
    told = expected(question, probe, card)
    if told is None or told.seconds <= AT_ONCE_S:
        call = engine.probe(question)
        st.session_state[f"{key}_asked"] = question
        return settled(call, key=key, cancel=True)
    job = _job_of(question)
    if job is not None and job.state == "succeeded":
        run = engine.run_of(job.result["run"])
        result = engine.result_of(run.id)
        if result.provenance.model_fingerprint == card.fingerprint:
            st.caption(esc(f"Computed by a job {fmt.ago(run.ended_at)} · run {run.id}"))
            return result
    if job is not None and job.state in ACTIVE:
        with st.container(border=True):
            live_jobs([job], prefix=f"{key}_job")
            st.caption("It goes on when this page is closed; its result is kept and opens here.")
        return None
    _offer(question, probe, told, key)
    return None


def ask_ahead() -> None:
    """Put the last quick question to the new prompt before anything is drawn; the prompt box's callback.

    Drawing the page down to the answer takes some 0.1 s, in which the inspector can already compute.
    """
    last: Question | None = st.session_state.get("probe_asked")
    opening = None if last is None else engine.open_model(last.source).ticket
    if last is None or opening is None or not opening.succeeded:
        return
    question = replace(last, prompt=replace(last.prompt, text=st.session_state["text"]))
    told = expected(question, get("probe", last.method), opening.result())
    if told is not None and told.seconds <= AT_ONCE_S:
        engine.probe(question)


def answer_of_other(source: str, question: Question, probe: Method, settings: Settings) -> Result | None:
    """What another model answers to the same question; None after drawing what there is instead."""
    try:
        card = settled(engine.open_model(source), key="open_other")
        if card is None:
            return None
        probe.refuse_if(probe.needs - card.offers, source)
        same = Question.of(source, probe, question.prompt, settings)
        return answer(same, probe, card, key="probe_other")
    except SlimscopeError as error:
        error_card(error, key="inspect_other")
        return None


def expected(question: Question, probe: Method, card: ModelCard) -> Estimate | None:
    """What the call is expected to take; None where nothing is known."""
    if card.pace is None:
        return None
    longest, settings = card.anatomy.context_length, probe.parse(question.values)
    texts = [text for text in (question.prompt.text, question.prompt.second) if text]
    # A text has no more tokens than bytes, and the special ones: what is quick for so many needs no exact count.
    n_tokens = min(longest, sum(len(t.encode()) for t in texts) + 4) if texts else longest
    try:
        told = estimate(probe, card.anatomy, card.pace, n_tokens, settings)
        if told.seconds > AT_ONCE_S and texts:
            n_tokens = max(1, sum(engine.n_tokens(question.source, text) for text in texts))
            told = estimate(probe, card.anatomy, card.pace, n_tokens, settings)
    except SlimscopeError:
        return None  # the probe itself refuses the same, with its reason
    return told


def words(told: Estimate) -> str:
    """An estimate in words: ``≈ 12 s, +300 MB``."""
    extra = f", +{fmt.size(told.extra_bytes)}" if told.extra_bytes >= 1e6 else ""
    return f"≈ {fmt.seconds(told.seconds)}{extra}"


def forwards(told: Estimate) -> str:
    """How many forward passes, in words."""
    return "one forward pass" if round(told.forwards) <= 1 else f"{told.forwards:,.0f} forward passes"


def _offer(question: Question, probe: Method, told: Estimate, key: str) -> None:
    """The cost, and what can be done: run now, or as a job."""
    with st.container(border=True, key=f"{key}_offer"):
        st.header(esc(words(told)), anchor=False)
        st.caption(
            esc(
                f"{probe.title} takes about {forwards(told)} over {told.n_tokens} tokens here; "
                "a job keeps its result and goes on when this page is closed."
            )
        )
        with st.container(horizontal=True, gap="small"):
            st.button(
                "Run now",
                icon=":material/play_arrow:",
                key=f"{key}_now",
                on_click=_ask,
                args=(question,),
            )
            st.button(
                "Run as a job",
                icon=":material/manufacturing:",
                type="tertiary",
                key=f"{key}_as_job",
                on_click=_queue,
                args=(question,),
            )


def _ask(question: Question) -> None:
    engine.probe(question)


def _queue(question: Question) -> None:
    submit_probe(
        engine.queue(),
        model=question.source,
        method=question.method,
        prompt=question.prompt,
        settings=question.values,
        reference=question.reference,
    )
    engine.start_work()


def _job_of(question: Question) -> Job | None:
    """The latest job that was given this very call."""
    spec = probe_spec(question.source, question.method, question.prompt, question.values, question.reference)
    jobs = (job for job in engine.queue().jobs(200) if job.kind == "probe" and job.spec == spec)
    return next(jobs, None)
