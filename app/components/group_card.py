"""Many variants made by one click: how far they are, what each weighs, and what must be said of those that are measured."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import pandas as pd
import streamlit as st

from app import engine
from app import format as fmt
from app.components import job_card as card
from app.components.verdict_note import verdict_note
from core.jobs.states import ACTIVE, ENDED
from core.types import Job

MANY = 6
"""More jobs than this are a table, not cards."""
KINDS = ("compress", "evaluate", "profile")
GROUP = 200
LINE, WRAPPED_PX = 56, 56
"""Letters of a recipe in one line of the table, and the height of a row that takes three: a control differs at its end."""


def group_card(jobs: Sequence[Job], *, prefix: str) -> None:
    """The jobs of one group, oldest first: as cards while they are few, else as a table of variants; redrawn while any is active."""
    if len(jobs) <= MANY:
        card.live_jobs(jobs, prefix=prefix)
        _said(jobs)
        return
    group = jobs[0].group_id
    active = any(job.state in ACTIVE for job in jobs)

    def draw() -> None:
        _table(engine.queue().jobs(GROUP, group_id=group)[::-1])

    st.fragment(draw, run_every=card.POLL_S if active else None)()
    _said(jobs)


def variants_of(jobs: Sequence[Job]) -> list[str]:
    """The variants that the group's finished compress jobs made."""
    return [
        str(job.result["variant"]) for job in jobs if job.kind == "compress" and job.result.get("variant")
    ]


def _table(jobs: Sequence[Job]) -> None:
    done = sum(job.state in ENDED for job in jobs)
    started = min((job.started_at for job in jobs if job.started_at), default=None)
    left = ""
    if started is not None and 0 < done < len(jobs):
        passed = (datetime.now(UTC) - started).total_seconds()
        left = f" · about {fmt.seconds(passed * (len(jobs) - done) / done)} left"
    st.progress(done / len(jobs), text=f"{done} of {len(jobs)} jobs ended{left}")
    rows = rows_of(jobs)
    st.dataframe(
        rows,
        hide_index=True,
        height="content",
        row_height=WRAPPED_PX if rows["subject"].str.len().max() > LINE else None,
        key="group_jobs",
        alt="The variants of this group and the state of their jobs",
        column_config={
            "subject": st.column_config.TextColumn("Variant", pinned=True, width="large"),
            **{kind: fmt.label(kind) for kind in KINDS},
            "error": "What went wrong",
        },
    )


def rows_of(jobs: Sequence[Job]) -> pd.DataFrame:
    """One row per variant, in the order of making: the state of its three jobs, and the first error."""
    rows: dict[str, dict[str, str]] = {}
    for job in jobs:
        row = rows.setdefault(card.subject(job), dict.fromkeys((*KINDS, "error"), ""))
        share = f" {card.fraction(job):.0%}" if job.state == "running" else ""
        row[job.kind] = job.state + share
        row["error"] = row["error"] or job.error
    return pd.DataFrame([{"subject": subject, **row} for subject, row in rows.items()])


def _said(jobs: Sequence[Job]) -> None:
    """What the measurements say against the variants of this group."""
    for id_ in variants_of(jobs):
        variant = engine.variant_of(id_)
        said = engine.verdicts(variant.base_id, engine.revision()).get(id_, ())
        verdict_note([f"{variant.name}: {sentence}" for sentence in said] if len(jobs) > MANY else said)
