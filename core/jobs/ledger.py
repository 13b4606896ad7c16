"""Every change of a job's row, as functions on an open session: the only place where states move.

The queue's users, the supervisor and the workers all go through here, each in one short write transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.orm import Session, aliased

from core.catalog.records import now
from core.catalog.tables import JobEvent, JobRow
from core.errors import BadInput
from core.jobs.states import ENDING, FOLLOWERS
from core.types import Job, JobState

Wish = Literal["go on", "pause", "cancel"]
"""What the user wants of a running job."""


def get(session: Session, id_: str) -> JobRow:
    """A job's row; raises ``BadInput`` when there is none."""
    row = session.get(JobRow, id_)
    if row is None:
        raise BadInput(f"no job is called {id_!r}; slimscope jobs lists them")
    return row


def record(row: JobRow) -> Job:
    """A job's frozen record."""
    return Job(
        id=row.id,
        group_id=row.group_id,
        kind=row.kind,
        spec=row.spec,
        state=row.state,
        attempt=row.attempt,
        done=row.done,
        total=row.total,
        message=row.message,
        error=row.error,
        log_path=row.log_path,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        heartbeat_at=row.heartbeat_at,
        pid=row.pid,
        exit_code=row.exit_code,
        cancel_requested=row.cancel_requested,
        pause_requested=row.pause_requested,
        depends_on=row.depends_on,
        result=row.result,
    )


def note(session: Session, row: JobRow, message: str) -> None:
    """Append to the job's history."""
    session.add(JobEvent(job_id=row.id, at=now(), attempt=row.attempt, state=row.state, message=message))


def _move(row: JobRow, state: JobState) -> None:
    assert state in FOLLOWERS[row.state], f"job {row.id}: {row.state} cannot become {state}"
    row.state = state


def claim(session: Session, *, host: str, workers: int) -> JobRow | None:
    """Take the oldest job that is ready, by one UPDATE, so that two claimers never get the same one.

    Ready: queued, and its predecessor (if any) has succeeded. The oldest ready job is never overtaken: one with a
    token waits until the host is idle and then keeps everything else waiting.
    """
    before, other = aliased(JobRow), aliased(JobRow)
    ready = or_(
        JobRow.depends_on.is_(None),
        select(before.id).where(before.id == JobRow.depends_on, before.state == "succeeded").exists(),
    )
    oldest = (
        select(JobRow.id)
        .where(JobRow.state == "queued", ready)
        .order_by(JobRow.created_at, JobRow.id)
        .limit(1)
        .scalar_subquery()
    )
    on_host = select(func.count()).where(other.state == "running", other.host == host)
    exclusive = on_host.where(other.token.is_not(None)).scalar_subquery()
    room = or_(
        on_host.scalar_subquery() == 0,
        and_(JobRow.token.is_(None), exclusive == 0, on_host.scalar_subquery() < workers),
    )
    statement = (
        update(JobRow)
        .where(JobRow.id == oldest, JobRow.state == "queued", room)
        .values(
            state="running",
            attempt=JobRow.attempt + 1,
            host=host,
            started_at=now(),
            heartbeat_at=now(),
            ended_at=None,
            pid=None,
            pid_created=None,
            rss_bytes=None,
            exit_code=None,
            error="",
            message="starting",
        )
        .returning(JobRow)
        .execution_options(synchronize_session=False)
    )
    row = session.scalars(statement).one_or_none()
    if row is not None:
        note(session, row, f"claimed on {host}")
    return row


def attach(session: Session, id_: str, attempt: int, *, pid: int, created: float) -> bool:
    """A worker says which process it is; False when the job is not its to run (any more)."""
    statement = (
        update(JobRow)
        .where(_mine(id_, attempt), JobRow.pid.is_(None))
        .values(pid=pid, pid_created=created, heartbeat_at=now())
        .returning(JobRow.id)
    )
    return session.execute(statement).one_or_none() is not None


def beat(session: Session, id_: str, attempt: int, values: Mapping[str, Any]) -> Wish | None:
    """A worker's sign of life with its progress: what its user wants; None when the job is no longer its own."""
    statement = (
        update(JobRow)
        .where(_mine(id_, attempt))
        .values(heartbeat_at=now(), **values)
        .returning(JobRow.cancel_requested, JobRow.pause_requested)
    )
    return _wish(session.execute(statement).one_or_none())


def wanted(session: Session, id_: str, attempt: int) -> Wish | None:
    """As ``beat``, without writing."""
    query = select(JobRow.cancel_requested, JobRow.pause_requested).where(_mine(id_, attempt))
    return _wish(session.execute(query).one_or_none())


def _wish(asked: Any) -> Wish | None:
    if asked is None:
        return None
    cancel, pause = asked
    return "cancel" if cancel else "pause" if pause else "go on"


def _mine(id_: str, attempt: int) -> Any:
    return and_(JobRow.id == id_, JobRow.attempt == attempt, JobRow.state == "running")


def end(
    session: Session,
    row: JobRow,
    state: JobState,
    *,
    message: str = "",
    error: str = "",
    exit_code: int | None = None,
    result: Mapping[str, Any] | None = None,
) -> None:
    """Bring a job to an end; the jobs that wait for it are cancelled unless it succeeded."""
    _move(row, state)
    row.ended_at, row.error, row.exit_code = now(), error, exit_code
    row.message = message or row.message
    row.result = dict(result or {})
    if state == "succeeded":
        row.done = row.total = row.total or 1.0
    note(session, row, error or message or state)
    if state != "succeeded":
        _block_dependants(session, row)


def pause(session: Session, row: JobRow) -> None:
    """Put a job aside until it is resumed; those that wait for it go on waiting."""
    _move(row, "paused")
    row.pause_requested = False
    row.message = "paused"
    note(session, row, "paused")


def _block_dependants(session: Session, row: JobRow) -> None:
    waiting = select(JobRow).where(JobRow.depends_on == row.id, JobRow.state == "queued")
    for dependant in session.scalars(waiting).all():
        dependant.blocked = True
        reason = (
            f"not started: it waits for job {row.id} ({row.kind}), which {ENDING[row.state]}; retry that job"
        )
        end(session, dependant, "cancelled", message="cancelled with the job it waits for", error=reason)


def unblock(session: Session, row: JobRow) -> None:
    """Queue the jobs again that were cancelled only because this one did not succeed."""
    blocked = select(JobRow).where(JobRow.depends_on == row.id, JobRow.blocked.is_(True))
    for dependant in session.scalars(blocked).all():
        requeue(session, dependant, f"queued again with job {row.id}", attempts=dependant.max_attempts)
        unblock(session, dependant)


def requeue(session: Session, row: JobRow, message: str, *, attempts: int) -> None:
    """Queue an ended job again; it may be tried until ``attempts`` is reached."""
    _move(row, "queued")
    row.max_attempts = attempts
    row.cancel_requested = row.pause_requested = row.blocked = False
    row.ended_at = row.heartbeat_at = row.pid = row.pid_created = None
    row.done = row.total = 0.0
    row.message, row.error = message, ""
    note(session, row, message)


def any_queued(session: Session) -> bool:
    """Whether there may be something to claim."""
    return session.scalars(select(JobRow.id).where(JobRow.state == "queued").limit(1)).first() is not None


def running(session: Session, host: str) -> list[JobRow]:
    """The jobs that are running on a host."""
    query = select(JobRow).where(JobRow.state == "running", JobRow.host == host).order_by(JobRow.started_at)
    return list(session.scalars(query))


def lose(session: Session, row: JobRow, error: str, *, exit_code: int | None) -> None:
    """The worker is gone without an answer: cancelled or paused if that was wanted, else lost and tried again if it
    may be."""
    if row.cancel_requested:
        end(session, row, "cancelled", message="cancelled", exit_code=exit_code)
    elif row.pause_requested:
        pause(session, row)
    elif row.attempt < row.max_attempts:
        _move(row, "lost")
        note(session, row, error)
        requeue(session, row, f"trying again: {error}", attempts=row.max_attempts)
    else:
        end(session, row, "lost", error=error, exit_code=exit_code)
