"""Runs one job and ends: ``python -m core.jobs.worker JOB_ID`` with the catalog in ``SLIMSCOPE_CATALOG``.

The task runs in the main thread. A second thread writes progress and signs of life and looks for the wish to
cancel, so reporting costs a task nothing. A worker whose job was given to another one ends at once. Extra task
modules may be named in ``SLIMSCOPE_TASKS`` (comma-separated); each has a dict ``TASKS`` like ``core.jobs.tasks``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import threading
import time
import traceback
from typing import Any

import psutil

from core.catalog.store import Catalog
from core.errors import (
    BadInput,
    Cancelled,
    CatalogError,
    Paused,
    SlimscopeError,
    ran_out_of_memory,
    refused_by_system,
)
from core.jobs import ledger
from core.jobs.context import Task, TaskContext
from core.jobs.queue import Queue
from core.jobs.scratch import scratch_folder
from core.types import Job, JobState

FLUSH_S = 0.5
BEAT_S = 2.0
NOT_MINE = 75
"""Exit code of a worker whose job is not its to run (EX_TEMPFAIL)."""


def say(text: str) -> None:
    """One line into the job's log, with the time."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


class Reporter(threading.Thread):
    """The job's ``Progress``, and the thread that writes it down at most twice a second."""

    def __init__(self, catalog: Catalog, job: Job) -> None:
        super().__init__(name="reporter", daemon=True)
        self._catalog = catalog
        self._job = job
        self._latest = (0.0, 0.0, job.message)
        self._wish: ledger.Wish = "go on"
        self._finished = threading.Event()
        self._process = psutil.Process()

    def __call__(self, done: float, total: float, message: str) -> None:
        """Note how far the task is; raises ``Cancelled``, or ``Paused``, when the user asked to stop."""
        self._latest = (float(done), float(total), message)
        if self._wish == "cancel":
            raise Cancelled("cancelled by the user")
        if self._wish == "pause":
            raise Paused("paused by the user")

    def finish(self) -> None:
        """Stop reporting; what came in since the last report is not written, as the job's end says more."""
        self._finished.set()
        self.join()

    def run(self) -> None:
        """Report until finished."""
        sent, beaten = None, 0.0
        while not self._finished.wait(FLUSH_S):
            latest = self._latest
            try:
                if latest != sent or time.monotonic() - beaten >= BEAT_S:
                    self._act_on(self._beat(latest, changed=latest != sent))
                    sent, beaten = latest, time.monotonic()
                else:
                    self._act_on(self._look())
            except CatalogError as error:
                say(f"cannot report for now: {error}")

    def _beat(self, latest: tuple[float, float, str], *, changed: bool) -> ledger.Wish | None:
        done, total, message = latest
        values: dict[str, Any] = {"rss_bytes": self._process.memory_info().rss}
        if changed:
            values |= {"done": done, "total": total, "message": message}
        with self._catalog.write("jobs_revision" if changed else None) as session:
            return ledger.beat(session, self._job.id, self._job.attempt, values)

    def _look(self) -> ledger.Wish | None:
        with self._catalog.read() as session:
            return ledger.wanted(session, self._job.id, self._job.attempt)

    def _act_on(self, wish: ledger.Wish | None) -> None:
        if wish is not None:
            self._wish = wish
        elif not self._finished.is_set():
            say("this job was given to another worker; this one ends")
            leave(NOT_MINE)


def leave(code: int) -> None:
    """End this process now, with every process it started, whatever threads it still has."""
    for child in psutil.Process().children(recursive=True):
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find_task(kind: str) -> Task:
    """The task of a kind; raises ``BadInput`` listing the known ones."""
    from core.jobs.tasks import TASKS

    extra = [name for name in os.environ.get("SLIMSCOPE_TASKS", "").split(",") if name]
    known = dict(TASKS)
    for name in extra:
        known |= importlib.import_module(name).TASKS
    if kind not in known:
        raise BadInput(f"no task is called {kind!r}; there are: {', '.join(sorted(known)) or 'none'}")
    return known[kind]


def work(catalog: Catalog, job: Job) -> None:
    """Run the job's task and write down how it ended."""
    reporter = Reporter(catalog, job)
    scratch = scratch_folder(catalog, job.id)
    scratch.mkdir(parents=True, exist_ok=True)
    reporter.start()
    state: JobState = "succeeded"
    error, result = "", {}
    try:
        task = find_task(job.kind)
        result = task(dict(job.spec), TaskContext(catalog, reporter, job, scratch, say))
        json.dumps(result, allow_nan=False)  # a task that returns no JSON is a failed one
    except Paused:
        state = "paused"
    except Cancelled:
        state = "cancelled"
    except SlimscopeError as problem:
        state, error = "failed", str(problem)
        say(f"{type(problem).__name__}: {problem}")
    except Exception as problem:  # noqa: BLE001 - whatever a task dies of is its job's end, not the worker's
        state, error = "failed", _told(problem)
        traceback.print_exc()
    reporter.finish()
    say(state)
    with catalog.write("jobs_revision") as session:
        row = ledger.get(session, job.id)
        if row.state != "running" or row.attempt != job.attempt:
            pass  # it was given to another worker, whose matter its end is
        elif state == "paused":
            ledger.pause(session, row)
        else:
            message = "cancelled" if state == "cancelled" else ""
            ledger.end(
                session,
                row,
                state,
                message=message,
                error=error,
                result=result if state == "succeeded" else {},
                exit_code=0,
            )
    if state == "succeeded":
        shutil.rmtree(scratch, ignore_errors=True)


def _told(problem: Exception) -> str:
    """One sentence for an error that is none of ours."""
    if ran_out_of_memory(problem):
        return f"out of memory ({problem}); choose a smaller model or free memory, then retry"
    if isinstance(problem, OSError):
        return refused_by_system(problem)
    return f"{type(problem).__name__}: {problem}; see the log"


def main(arguments: list[str] | None = None) -> None:
    """Command line of the worker."""
    parser = argparse.ArgumentParser(prog="core.jobs.worker", description=__doc__)
    parser.add_argument("job_id")
    job_id = parser.parse_args(arguments).job_id
    catalog = Catalog()
    job = Queue(catalog).job(job_id)
    with catalog.write("jobs_revision") as session:
        created = psutil.Process().create_time()
        mine = ledger.attach(session, job.id, job.attempt, pid=os.getpid(), created=created)
    if not mine:
        say(f"job {job.id} is {job.state} and has its worker; this one ends")
        leave(NOT_MINE)
    say(f"attempt {job.attempt}: {job.kind} {json.dumps(dict(job.spec))}")
    work(catalog, job)
    leave(0)


if __name__ == "__main__":
    main()
