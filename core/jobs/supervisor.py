"""The daemon that runs a catalog's queue on this machine: ``python -m core.jobs.supervisor``.

One per catalog (a file lock held for life). It claims jobs, starts their workers, stops the ones that were
cancelled, and finds the ones that died. It keeps nothing in memory that matters: killed at any moment, its workers
go on, and the next supervisor adopts them from the table. It never runs a task itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime

from core.catalog.store import Catalog
from core.catalog.tables import JobRow
from core.errors import BadInput, CatalogError, SlimscopeError, WorkerDied
from core.jobs import ledger
from core.jobs.executors.local import LocalExecutor, Worker
from core.jobs.lock import hold_lock, lock_path, supervisor_pid
from core.jobs.logs import tail
from core.jobs.queue import Queue
from core.jobs.scratch import sweep
from core.types import Job

LOG_LINES = 5


@dataclass(frozen=True)
class Timing:
    """How patient the supervisor is, in seconds."""

    poll_s: float = 0.25
    start_s: float = 30.0
    """A claimed job whose worker has not said who it is."""
    stale_s: float = 60.0
    """A worker that gives no sign of life (it should every 2 s)."""
    grace_s: float = 10.0
    """From the wish to cancel to SIGTERM: time for the task to stop at its next report."""
    pause_s: float = 300.0
    """The same for the wish to pause: a large model's checkpoint takes its time, and is what the user wants."""
    kill_s: float = 5.0
    """From SIGTERM to SIGKILL; also for a worker that does not end after its job did."""
    idle_s: float = 600.0
    """Without any job, until the supervisor ends itself."""


@dataclass
class Watch:
    """What this supervisor saw of one running attempt, on its own monotonic clock (immune to clock changes)."""

    attempt: int
    heartbeat: datetime | None
    heartbeat_seen: float
    stop_seen: float | None = None
    verdict: str = ""
    """Why this supervisor killed the worker."""


class Supervisor:
    """One round after another: look at every running job, then start what is ready."""

    def __init__(self, catalog: Catalog, *, timing: Timing, workers: int) -> None:
        self._catalog = catalog
        self._timing = timing
        self._workers = workers
        self._host = socket.gethostname()
        self._executor = LocalExecutor(catalog.url)
        self._exits: dict[str, int] = {}
        self._watches: dict[str, Watch] = {}
        self._lingering: dict[str, float] = {}

    def run(self) -> None:
        """Go on until there has been nothing to do for ``idle_s``."""
        idle_since, said = time.monotonic(), ""
        while time.monotonic() - idle_since < self._timing.idle_s:
            try:
                self.round()
                if Queue(self._catalog).active_count() or self._executor.job_ids:
                    idle_since = time.monotonic()
            except CatalogError as error:  # a full disk, a server restarted: workers go on, and so do we
                if str(error) != said:
                    said = str(error)
                    sys.stderr.write(f"{said}\n")
            time.sleep(self._timing.poll_s)

    def round(self) -> None:
        """Reap and judge the workers, then claim jobs while there is room."""
        self._exits |= self._executor.reap()
        with self._catalog.read() as session:
            rows = ledger.running(session, self._host)
        for row in rows:
            self._judge(row, self._exits.get(row.id))
        self._exits.clear()  # only now: had the catalog failed us above, they would be needed next round
        running = {row.id for row in rows}
        self._watches = {id_: watch for id_, watch in self._watches.items() if id_ in running}
        if not self._hurry_lingering(running):
            self._start_ready()

    # --- running jobs ---------------------------------------------------------------------------------

    def _judge(self, row: JobRow, exit_code: int | None) -> None:
        """Find out whether a running job's worker is dead, stuck, or to be stopped."""
        watch = self._watch(row)
        worker = self._worker(row)
        if exit_code is not None:
            self._lose(row, watch, exit_code)
        elif worker is None:
            if time.monotonic() - watch.heartbeat_seen > self._timing.start_s:
                watch.verdict = f"its worker did not start within {self._timing.start_s:.0f} s"
                self._lose(row, watch, None)
        elif not worker.alive():
            if (
                row.id not in self._executor.job_ids
            ):  # a child of ours is reaped, with its exit code, next round
                worker.signal_group(signal.SIGKILL)
                self._lose(row, watch, None)
        elif row.cancel_requested:
            self._stop(worker, watch, self._timing.grace_s)
        elif row.pause_requested:
            self._stop(worker, watch, self._timing.pause_s)
        elif time.monotonic() - watch.heartbeat_seen > self._timing.stale_s:
            watch.verdict = f"its worker gave no sign of life for {self._timing.stale_s:.0f} s and was killed"
            worker.signal_group(signal.SIGKILL)

    def _watch(self, row: JobRow) -> Watch:
        watch = self._watches.get(row.id)
        if watch is None or watch.attempt != row.attempt:
            watch = self._watches[row.id] = Watch(row.attempt, row.heartbeat_at, time.monotonic())
        if watch.heartbeat != row.heartbeat_at:
            watch.heartbeat, watch.heartbeat_seen = row.heartbeat_at, time.monotonic()
        return watch

    def _worker(self, row: JobRow) -> Worker | None:
        own = self._executor.worker(row.id)
        if own is not None or row.pid is None or row.pid_created is None:
            return own
        return Worker(row.pid, row.pid_created)

    def _stop(self, worker: Worker, watch: Watch, grace_s: float) -> None:
        """The task was asked gently through its progress; after ``grace_s`` the group is told, then killed."""
        if watch.stop_seen is None:
            watch.stop_seen = time.monotonic()
        waited = time.monotonic() - watch.stop_seen
        if waited > grace_s + self._timing.kill_s:
            worker.signal_group(signal.SIGKILL)
        elif waited > grace_s:
            worker.signal_group(signal.SIGTERM)

    def _lose(self, row: JobRow, watch: Watch, exit_code: int | None) -> None:
        error = _cause(row, watch.verdict, exit_code)
        if row.pid is not None:
            self._catalog.artifacts.discard(row.pid)
        with self._catalog.write("jobs_revision") as session:
            current = ledger.get(session, row.id)
            # It may have ended properly between our look at the table and its worker's exit.
            if current.state == "running" and current.attempt == row.attempt:
                ledger.lose(session, current, error, exit_code=exit_code)

    # --- starting -------------------------------------------------------------------------------------

    def _hurry_lingering(self, running: set[str]) -> bool:
        """Whether a worker is still here although its job has ended; a new job would share the machine with it."""
        now = time.monotonic()
        lingering = self._executor.job_ids - running
        self._lingering = {id_: self._lingering.get(id_, now) for id_ in lingering}
        for id_, since in self._lingering.items():
            worker = self._executor.worker(id_)
            if worker is not None and now - since > self._timing.kill_s:
                worker.signal_group(signal.SIGKILL)
        return bool(lingering)

    def _start_ready(self) -> None:
        while (job := self._claim()) is not None:
            try:
                self._executor.start(job)
            except OSError as error:
                with self._catalog.write("jobs_revision") as session:
                    row = ledger.get(session, job.id)
                    ledger.end(
                        session, row, "failed", error=f"no worker could be started: {error}; retry later"
                    )

    def _claim(self) -> Job | None:
        with self._catalog.read() as session:  # no write lock, round after round, for an empty queue
            if not ledger.any_queued(session):
                return None
        with self._catalog.write("jobs_revision") as session:
            row = ledger.claim(session, host=self._host, workers=self._workers)
            return None if row is None else ledger.record(row)


def _cause(row: JobRow, verdict: str, exit_code: int | None) -> str:
    """One sentence on why a worker is gone, with its last words."""
    if verdict:
        text = verdict
    elif exit_code is None:
        text = "its worker is gone; how it ended is not known, because an earlier supervisor had started it"
    elif exit_code == -signal.SIGKILL:
        held = "" if row.rss_bytes is None else f" (it last held {row.rss_bytes / 1e9:.1f} GB)"
        text = f"its worker was killed, exit code -9: probably by the system, for lack of memory{held}"
    elif exit_code < 0:
        text = f"its worker was ended by {signal.Signals(-exit_code).name}, exit code {exit_code}"
    else:
        text = f"its worker ended with exit code {exit_code} before it gave an answer"
    lines = tail(row.log_path, LOG_LINES)
    return text + (f"; last lines of its log: {' | '.join(lines)}" if lines else "")


# --- one supervisor per catalog ---------------------------------------------------------------------------


def ensure_supervisor(url: str, *, timing: Timing | None = None, patience_s: float = 15.0) -> int:
    """The pid of the catalog's supervisor, started if none lives; raises ``WorkerDied`` when it does not start.

    It is nobody's child and in a session of its own: it outlives whoever called this.
    """
    pid = supervisor_pid(url)
    if pid is not None:
        return pid
    log = lock_path(url).parent / "logs" / "supervisor.log"
    log.parent.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "core.jobs.supervisor",
        "--timing",
        json.dumps(asdict(timing or Timing())),
    ]
    launch = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
    with log.open("ab") as output:
        subprocess.run(  # the one that starts it ends at once, so that it is no child (and no zombie) of ours
            [sys.executable, "-S", "-c", launch, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "SLIMSCOPE_CATALOG": url, "PYTHONUNBUFFERED": "1"},
            check=True,
        )
    deadline = time.monotonic() + patience_s
    while (pid := supervisor_pid(url)) is None:
        if time.monotonic() > deadline:
            raise WorkerDied(f"the supervisor did not start; {log} ends with: {' | '.join(tail(log, 3))}")
        time.sleep(0.05)
    return pid


def _workers() -> int:
    """How many jobs may run at once here (``SLIMSCOPE_WORKERS``, default 1); raises ``BadInput``."""
    text = os.environ.get("SLIMSCOPE_WORKERS", "1")
    if not text.isdigit() or int(text) < 1:
        raise BadInput(f"SLIMSCOPE_WORKERS is {text!r}; it is how many jobs may run at once: 1 or more")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the daemon; the catalog is ``SLIMSCOPE_CATALOG``."""
    parser = argparse.ArgumentParser(prog="core.jobs.supervisor", description=__doc__)
    parser.add_argument("--timing", type=json.loads, default={}, help="JSON of Timing")
    timing = Timing(**parser.parse_args(arguments).timing)
    try:
        catalog, workers = Catalog(), _workers()
    except SlimscopeError as error:
        sys.exit(str(error))
    while (lock := hold_lock(catalog.url)) is not None:
        sweep(catalog)
        Supervisor(catalog, timing=timing, workers=workers).run()
        lock.close()
        # A job that came in while we were ending saw us alive and started nobody else.
        if not Queue(catalog).active_count():
            return


if __name__ == "__main__":
    main()
