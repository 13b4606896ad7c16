"""Jobs: what runs, what waits, what went wrong, and its log."""

from __future__ import annotations

from datetime import UTC, datetime

import pandas as pd
import streamlit as st

from app import engine, questions
from app import format as fmt
from app.components import job_card as card
from app.components import measured_link
from app.components.empty_state import empty_state
from app.components.heading import About, Reproduction, heading
from core.jobs.logs import tail
from core.jobs.states import ACTIVE
from core.types import Job

ABOUT = About(
    "Every piece of long work is a job: a row in the catalog, run by a worker process of its own, which goes on when "
    "this page is closed.\n\n"
    "A job that measures speed runs alone on this machine. Cancelling asks first and kills later; a job whose worker "
    "died is found, reported and tried again from what it had finished.\n\n"
    "The time left is the time so far, scaled by the share that is still to do."
)
REPRODUCE = Reproduction(
    "from core.catalog.store import Catalog\nfrom core.jobs.queue import Queue\n\n"
    "for job in Queue(Catalog()).jobs():\n    print(job.id, job.kind, job.state, job.error)",
    "slimscope jobs --json",
)
LOG_LINES = 120
STATES = ["queued", "running", "paused", "succeeded", "failed", "cancelled", "lost"]


def pick(ids: list[str]) -> None:
    """The address follows the table."""
    rows = st.session_state["queue"]["selection"]["rows"]
    if rows:
        st.query_params["job"] = ids[rows[0]]
    else:
        st.query_params.pop("job", None)


def rows_of(jobs: list[Job]) -> pd.DataFrame:
    """The queue as a table, newest first."""
    now = datetime.now(UTC)
    return pd.DataFrame(
        {
            "kind": [fmt.label(job.kind) for job in jobs],
            "state": [[job.state] for job in jobs],
            "subject": [card.subject(job) for job in jobs],
            "progress": [card.fraction(job) * 100 for job in jobs],
            "left": [fmt.seconds(card.time_left(job, now)) for job in jobs],
            "took": [fmt.seconds(card.elapsed(job, now)) for job in jobs],
            "attempt": [job.attempt for job in jobs],
            "model": [str(job.spec.get("model", "")) for job in jobs],
            "created": [fmt.ago(job.created_at, now) for job in jobs],
        }
    )


def table(jobs: list[Job], chosen: str | None) -> None:
    """The queue; a click on a row opens its job beside it."""
    ids = [job.id for job in jobs]
    rows = [ids.index(chosen)] if chosen in ids else []
    if (st.session_state.get("queue") or {}).get("selection", {}).get("rows") != rows:
        st.session_state["queue"] = {"selection": {"rows": rows}}
    column = st.column_config
    st.dataframe(
        rows_of(jobs),
        hide_index=True,
        height="content" if len(jobs) <= 18 else 640,
        key="queue",
        on_select=lambda: pick(ids),
        selection_mode="single-row",
        alt="The job queue, newest first",
        column_config={
            "state": column.MultiselectColumn(
                "State", options=STATES, color=[card.COLORS[state] for state in STATES], width=100
            ),
            "kind": column.TextColumn("Job", pinned=True, width=80),
            "subject": column.TextColumn("Of", width=220),
            "progress": column.ProgressColumn(
                "Progress", format="%.0f %%", min_value=0, max_value=100, width=120
            ),
            "left": column.TextColumn("Left", width=70),
            "took": column.TextColumn("Took", width=80),
            "attempt": column.NumberColumn("Attempt", width=70),
            "model": "Model",
            "created": column.TextColumn("Queued", width=90),
        },
    )


def detail(job: Job) -> None:
    """One job in full: its card, its facts, the end of its log."""
    card.job_card(job, prefix="detail", narrow=True)
    st.caption(f"Job {job.id} · group {job.group_id} · queued {fmt.ago(job.created_at)}")
    log = "\n".join(tail(job.log_path, LOG_LINES))
    st.code(log or "No log yet.", language=None, height=360, wrap_lines=True)
    variant = job.result.get("variant")
    if job.kind in ("probe", "train") and job.result.get("run"):
        page = questions.page_of_id(str(job.spec.get("method"))) or "inspect"
        st.page_link(
            f"../pages/{page}.py",
            label="Open the result",
            icon=":material/troubleshoot:",
            query_params={"model": str(job.spec["model"]), "run": str(job.result["run"])},
        )
    elif job.state == "succeeded" and job.kind in measured_link.PARTS:
        measured_link.measured_link(job)
    elif variant:
        st.page_link(
            "../pages/tradeoffs.py",
            label="Show the variant",
            icon=":material/scatter_plot:",
            query_params={"variant": str(variant)},
        )


def board() -> None:
    """Table and detail, drawn anew every second while something is active."""
    jobs = engine.queue().jobs(100)
    chosen = st.query_params.get("job")
    active = [job for job in jobs if job.state in ACTIVE]
    st.caption(f"{sum(job.state == 'running' for job in active)} running, {len(active)} not finished")
    left, right = st.columns([1.9, 1], gap="small")
    with left:
        table(jobs, chosen)
    with right.container(border=True):
        shown = next((job for job in jobs if job.id == chosen), active[-1] if active else jobs[0])
        detail(shown)
    if bool(active) != polling:
        st.rerun()


heading("Jobs", about=ABOUT, reproduce=REPRODUCE)
polling = engine.queue().active_count() > 0
if not engine.queue().jobs(1):
    empty_state(
        "Nothing has run yet. Making a variant queues its compression, evaluation and profile here.",
        icon="manufacturing",
        page="compress",
        action="Make a variant",
    )
    st.stop()
st.fragment(board, run_every=card.POLL_S if polling else None)()
