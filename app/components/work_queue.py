"""The jobs that a page queued and that are not over, how far they are together, and what of them went wrong."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime

import streamlit as st

from app import engine
from app import format as fmt
from app.components import job_card as card
from core.jobs.states import ACTIVE, ENDED
from core.types import Job

LOOKED_BACK = 200
SHOWN = 3
"""Cards at most; the rest is counted."""


def work_queue(kinds: Collection[str], models: Collection[str], *, key: str) -> None:
    """Draw the newest group of jobs of these kinds on these models, if it is not over or did not end well.

    Redraws itself every second while one is active; what ended well is said by the page's own results.
    """
    jobs = _latest(kinds, models)
    if not jobs:
        return
    active = any(job.state in ACTIVE for job in jobs)
    if not active and all(job.state in ("succeeded", "cancelled") for job in jobs):
        return
    group = jobs[0].group_id

    def draw() -> None:
        _draw(engine.queue().jobs(LOOKED_BACK, group_id=group)[::-1], key)

    with st.container(border=True, key=f"{key}_queue"):
        st.fragment(draw, run_every=card.POLL_S if active else None)()


def _latest(kinds: Collection[str], models: Collection[str]) -> list[Job]:
    """The jobs of the newest group with any of these, oldest first."""
    of_these = [
        job
        for job in engine.queue().jobs(LOOKED_BACK)
        if job.kind in kinds and str(job.spec.get("model")) in models and not job.spec.get("recipe")
    ]
    return [job for job in of_these if job.group_id == of_these[0].group_id][::-1] if of_these else []


def _draw(jobs: list[Job], key: str) -> None:
    ended = [job for job in jobs if job.state in ENDED]
    if len(jobs) > 1:
        started = min((job.started_at for job in jobs if job.started_at), default=None)
        left = ""
        if started is not None and 0 < len(ended) < len(jobs):
            passed = (datetime.now(UTC) - started).total_seconds()
            left = f" · about {fmt.seconds(passed * (len(jobs) - len(ended)) / len(ended))} left"
        st.progress(len(ended) / len(jobs), text=f"{len(ended)} of {len(jobs)} measured or ended{left}")
    wrong = [job for job in ended if job.state in ("failed", "lost")]
    waiting = [job for job in jobs if job.state in (*ACTIVE, "paused")]
    shown = (waiting + wrong)[:SHOWN]
    for job in shown:
        card.job_card(job, prefix=key, narrow=True)
    rest = len(waiting) + len(wrong) - len(shown)
    if rest > 0:
        st.caption(f"and {rest} more, under Jobs")
