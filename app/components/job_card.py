"""One job as a card: what it does, its state, its progress with the time left, what it learns, and what can be done about it.

Also the watcher that says, on any page, that a job has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import streamlit as st

from app import engine
from app import format as fmt
from app.components.loss_curve import loss_curve
from app.live_training import running
from app.text import esc
from core.errors import BadInput, SlimscopeError
from core.jobs.states import ACTIVE, ENDED, RETRIABLE
from core.recipe import Recipe
from core.registry import methods
from core.types import Job, JobState

COLORS: dict[JobState, str] = {
    "queued": "gray",
    "running": "blue",
    "paused": "orange",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "orange",
    "lost": "red",
}
KEEPING = ("compress", "evaluate")
"""Jobs that go on from what they had finished; others would begin again after a pause."""
VERBS = {
    "Resume": "resume", "Retry": "retry", "Pause": "pause", "Pausing": "pause", "Cancel": "cancel", "Stopping": "cancel",
}  # fmt: skip
POLL_S = 1.0
RECENT = 50


# --- what a card says ---------------------------------------------------------------------------------


def subject(job: Job) -> str:
    """What the job is about: a recipe's label, a probe's, training's or export's title; the model itself where there is neither."""
    if job.kind in ("probe", "train", "export"):
        known = methods(job.kind)  # type: ignore[arg-type]
        id_ = str(job.spec.get("method"))
        return known[id_].title if id_ in known else "a method this version does not know"
    if job.kind in ("where", "race", "machine", "device"):
        return _measured(job)
    recipe = job.spec.get("recipe")
    if not recipe:
        return _measured(job) if str(job.spec.get("model")).startswith("variant:") else "the base"
    try:
        return Recipe.parse(recipe).label()
    except BadInput:
        return "a recipe this version does not know"


def _measured(job: Job) -> str:
    """What a measurement of models of the catalog is about: their names, and the runtimes they run in."""
    spec = job.spec
    if job.kind == "machine":
        return "the roofs of this machine"
    if job.kind == "device":
        what = f"{_name(str(spec['variant']))} on " if "variant" in spec else ""
        return f"{spec['action']} {what}{spec['slug']}"
    if job.kind == "race":
        sides = [
            f"{_name(str(spec['a']))} in {spec['runtime_a']}",
            f"{_name(str(spec['b']))} in {spec['runtime_b']}",
        ]
        return " against ".join(sides)
    name = _name(str(spec["model"]).removeprefix("variant:"))
    settings: Mapping[str, Any] = spec.get("settings") or {}
    weights = settings.get("weights", "stored")
    told = f" {weights}" if weights != "stored" else ""
    return f"{name} in {spec['method']}{told}" if "method" in spec else name


def _name(variant: str) -> str:
    try:
        return engine.variant_of(variant).name
    except BadInput:
        return variant


def title(job: Job) -> str:
    """What the job does, e.g. ``Compress · rtn bits=8``."""
    return f"{fmt.label(job.kind)} · {subject(job)}"


def fraction(job: Job) -> float:
    """Share done, 0–1."""
    return min(1.0, job.done / job.total) if job.total else 0.0


def time_left(job: Job, now: datetime) -> float | None:
    """Seconds left at the rate so far; None before there is a rate, or when the job does not run."""
    share = fraction(job)
    if job.state != "running" or job.started_at is None or share < 0.02:
        return None
    return (now - job.started_at).total_seconds() * (1 - share) / share


def elapsed(job: Job, now: datetime) -> float | None:
    """Seconds the job ran, or has run."""
    if job.started_at is None:
        return None
    return ((job.ended_at or now) - job.started_at).total_seconds()


def progress_text(job: Job, now: datetime) -> str:
    """The line beside the bar: the message, then the time left or the time taken."""
    left, took = time_left(job, now), elapsed(job, now)
    if job.state == "queued":
        return job.message or ("waits for the job before it" if job.depends_on else "waits for its turn")
    if job.state == "paused":
        return "paused: it goes on from what it had finished"
    tail = f"about {fmt.seconds(left)} left" if left is not None else f"{fmt.seconds(took)}"
    return " · ".join(part for part in (job.message, tail) if part)


# --- the card -----------------------------------------------------------------------------------------


def job_card(job: Job, *, prefix: str, narrow: bool = False) -> None:
    """Draw the job with its progress and its buttons, for a bordered container around it; a training with its curve so far."""
    now = datetime.now(UTC)
    with st.container(key=f"{prefix}_{job.id}", gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            st.markdown(f"**{esc(title(job))}**", width="stretch")
            again = f", attempt {job.attempt}" if job.attempt > 1 else ""
            st.markdown(f":{COLORS[job.state]}-badge[{job.state}{again}]", width="content")
            job_action(job, prefix=prefix)
        if job.state in (*ACTIVE, "paused"):
            st.progress(fraction(job), text=esc(progress_text(job, now)))
            course = None if job.state == "queued" else running(job)
            if course is not None:
                loss_curve(course, key=f"{prefix}_{job.id}", narrow=narrow)
        elif job.error:
            st.markdown(f":red[{esc(job.error)}]" if job.state != "cancelled" else f":gray[{esc(job.error)}]")
        else:
            st.caption(esc(progress_text(job, now)))


def job_action(job: Job, *, prefix: str) -> None:
    """Pause, resume or cancel what is not over; retry what did not succeed."""
    if job.state == "paused":
        _button("Resume", "play_arrow", engine.queue().resume, job, prefix)
    elif job.state in RETRIABLE:
        _button("Retry", "refresh", engine.queue().retry, job, prefix)
    elif job.state == "queued" or (job.state == "running" and job.kind in KEEPING):
        asked = job.pause_requested
        _button("Pausing" if asked else "Pause", "pause", engine.queue().pause, job, prefix, off=asked)
    if job.state in (*ACTIVE, "paused"):
        asked = job.cancel_requested
        _button("Stopping" if asked else "Cancel", "close", engine.queue().cancel, job, prefix, off=asked)


def _button(
    label: str, icon: str, act: Callable[[str], Job], job: Job, prefix: str, *, off: bool = False
) -> None:
    verb = VERBS[label]
    st.button(
        label,
        type="tertiary",
        icon=f":material/{icon}:",
        disabled=off,
        on_click=_do,
        args=(act, job.id),
        key=f"{prefix}_{verb}_{job.id}",
    )


def _do(act: Callable[[str], Job], id_: str) -> None:
    try:
        if act(id_).state == "queued":
            engine.start_work()
    except SlimscopeError as error:  # it ended meanwhile
        st.session_state.setdefault("toasts", []).append(f":red[{esc(error)}]")


# --- on every page ------------------------------------------------------------------------------------


def job_toasts() -> None:
    """Say what ended since the last look, and keep looking while something runs; called once per page run.

    A toast sent together with ``st.rerun`` is lost, so what ended is remembered and said by the next full run,
    which also lets every page show the new numbers.
    """
    for text in st.session_state.pop("toasts", []):
        st.toast(text)
    jobs = engine.queue().jobs(RECENT)
    st.session_state["jobs_active"] = {job.id for job in jobs if job.state in ACTIVE}
    st.fragment(_watch, run_every=POLL_S * 2 if st.session_state["jobs_active"] else None)()


def _watch() -> None:
    was = st.session_state["jobs_active"]
    if not was:
        return
    ended = [job for job in engine.queue().jobs(RECENT) if job.id in was and job.state in (*ENDED, "paused")]
    if ended:
        st.session_state.setdefault("toasts", []).extend(map(ending, ended))
        st.rerun()


def ending(job: Job) -> str:
    """The toast of an ended job."""
    color = COLORS[job.state]
    return f"{esc(title(job))}: :{color}[{job.state}]" + (f". {esc(job.error)}" if job.error else "")


def live_jobs(jobs: Sequence[Job], *, prefix: str) -> None:
    """Cards that redraw themselves every second as long as one of the jobs is active."""
    ids = [job.id for job in jobs]
    active = any(job.state in ACTIVE for job in jobs)

    def draw() -> None:
        for id_ in ids:
            job_card(engine.queue().job(id_), prefix=prefix)

    st.fragment(draw, run_every=POLL_S if active else None)()
