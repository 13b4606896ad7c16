"""The queue as its users see it: submit, look, pause, resume, cancel, retry, wait. The queue is the catalog's ``job`` table.

Starts no process: ``core.jobs.supervisor.ensure_supervisor`` does. What supervisor and workers do to the table is
in ``core.jobs.ledger``.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, tuple_

from core.catalog.records import new_id, now
from core.catalog.store import Catalog
from core.catalog.tables import JobEvent, JobRow
from core.errors import BadInput
from core.jobs import ledger
from core.jobs.states import ACTIVE, ENDED, ENDING, RETRIABLE
from core.types import Job

MAX_ATTEMPTS = 2


def device_token() -> str:
    """The token of a job that needs this host for itself, as every job that measures speed does."""
    return f"device:{socket.gethostname()}"


class Queue:
    """The jobs of one catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def submit(
        self,
        kind: str,
        spec: Mapping[str, Any],
        *,
        depends_on: str | None = None,
        group_id: str | None = None,
        token: str | None = None,
    ) -> Job:
        """Queue a job of a task kind (``core.jobs.tasks``); ``spec`` is plain JSON.

        It starts after ``depends_on`` has succeeded. A job with any ``token`` runs alone on its host. Jobs of one
        ``group_id`` (default: that of ``depends_on``, else a new one) belong together on the page. Raises
        ``BadInput`` when ``depends_on`` is unknown or has already ended without success.
        """
        id_ = new_id()
        with self.catalog.write("jobs_revision") as session:
            before = None if depends_on is None else ledger.get(session, depends_on)
            if before is not None and before.state in RETRIABLE:
                raise BadInput(f"job {before.id} ({before.kind}) {ENDING[before.state]}; retry it first")
            row = JobRow(
                id=id_,
                group_id=group_id or (before.group_id if before else id_),
                kind=kind,
                spec=dict(spec),
                state="queued",
                token=token,
                attempt=0,
                max_attempts=MAX_ATTEMPTS,
                done=0.0,
                total=0.0,
                message="",
                error="",
                log_path=str(self.log_folder / f"{id_}.log"),
                created_at=now(),
                cancel_requested=False,
                pause_requested=False,
                depends_on=depends_on,
                blocked=False,
                result={},
            )
            session.add(row)
            session.flush()
            ledger.note(session, row, "submitted")
            return ledger.record(row)

    @property
    def log_folder(self) -> Path:
        """Where the jobs' logs are."""
        return self.catalog.folder / "logs"

    def job(self, id_: str) -> Job:
        """One job; raises ``BadInput`` when there is none of that id."""
        with self.catalog.read() as session:
            return ledger.record(ledger.get(session, id_))

    def jobs(self, limit: int = 50, *, before: Job | None = None, group_id: str | None = None) -> list[Job]:
        """The newest jobs first; ``before`` is the last job of the previous page."""
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
        if before is not None:
            query = query.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(before.created_at, before.id))
        if group_id is not None:
            query = query.where(JobRow.group_id == group_id)
        with self.catalog.read() as session:
            return [ledger.record(row) for row in session.scalars(query)]

    def active_count(self) -> int:
        """How many jobs are queued or running."""
        with self.catalog.read() as session:
            query = select(func.count()).select_from(JobRow).where(JobRow.state.in_(ACTIVE))
            return session.execute(query).scalar_one()

    def events(self, id_: str) -> list[str]:
        """What happened to a job, oldest first, one line each."""
        query = select(JobEvent).where(JobEvent.job_id == id_).order_by(JobEvent.id)
        with self.catalog.read() as session:
            return [
                f"{event.at:%Y-%m-%d %H:%M:%S} {event.state} (attempt {event.attempt}): {event.message}"
                for event in session.scalars(query)
            ]

    def cancel(self, id_: str) -> Job:
        """Stop a job: at once if it is queued, gently and then by force if it runs; an ended one stays as it is."""
        with self.catalog.write("jobs_revision") as session:
            row = ledger.get(session, id_)
            if row.state == "queued":
                ledger.end(session, row, "cancelled", message="cancelled before it started")
            elif row.state == "paused":
                ledger.end(session, row, "cancelled", message="cancelled while it was paused")
            elif row.state == "running" and not row.cancel_requested:
                row.cancel_requested = True
                ledger.note(session, row, "cancel requested")
            return ledger.record(row)

    def pause(self, id_: str) -> Job:
        """Put a job aside: at once if it is queued; a running one stops at its next report and keeps what it finished.

        Raises ``BadInput`` for one that has ended.
        """
        with self.catalog.write("jobs_revision") as session:
            row = ledger.get(session, id_)
            if row.state in ENDED:
                raise BadInput(f"job {id_} {ENDING[row.state]}; only one that waits or runs can be paused")
            if row.state == "queued":
                ledger.pause(session, row)
            elif row.state == "running" and not row.pause_requested:
                row.pause_requested = True
                ledger.note(session, row, "pause requested")
            return ledger.record(row)

    def resume(self, id_: str) -> Job:
        """Queue a paused job again: it goes on from what it kept. Raises ``BadInput`` for any other."""
        with self.catalog.write("jobs_revision") as session:
            row = ledger.get(session, id_)
            if row.state != "paused":
                raise BadInput(f"job {id_} is {row.state}; only a paused one can be resumed")
            ledger.requeue(session, row, "resumed", attempts=row.attempt + MAX_ATTEMPTS)
            return ledger.record(row)

    def retry(self, id_: str) -> Job:
        """Queue an ended job again, and with it the jobs that were cancelled because they waited for it.

        It goes on from what its last attempt left in its scratch folder. Raises ``BadInput`` when the job succeeded,
        is not over yet, or waits for one that did not succeed.
        """
        with self.catalog.write("jobs_revision") as session:
            row = ledger.get(session, id_)
            if row.state not in RETRIABLE:
                raise BadInput(
                    f"job {id_} is {row.state}; only one that has failed, was cancelled or lost can be retried"
                )
            before = None if row.depends_on is None else ledger.get(session, row.depends_on)
            if before is not None and before.state in RETRIABLE:
                raise BadInput(
                    f"job {id_} waits for job {before.id} ({before.kind}), which {ENDING[before.state]}; retry that"
                )
            ledger.requeue(session, row, "retried", attempts=row.attempt + MAX_ATTEMPTS)
            ledger.unblock(session, row)
            return ledger.record(row)

    def wait(self, id_: str, *, timeout_s: float | None = None, poll_s: float = 0.2) -> Job:
        """Block until a job has ended or is paused (for the CLI and tests, never in a page); raises ``TimeoutError``."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (job := self.job(id_)).state not in (*ENDED, "paused"):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"job {id_} is still {job.state} after {timeout_s} s")
            time.sleep(poll_s)
        return job
