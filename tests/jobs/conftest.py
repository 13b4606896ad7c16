from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from core.catalog.store import Catalog
from core.jobs.lock import supervisor_pid
from core.jobs.queue import Queue
from core.jobs.supervisor import Timing, ensure_supervisor
from core.types import Job

QUICK = Timing(poll_s=0.05, start_s=60.0, stale_s=40.0, grace_s=1.0, kill_s=1.0, idle_s=120.0)


def until(condition: Callable[[], object], *, timeout_s: float = 90.0) -> None:
    """Wait for a condition; the machine may be busy, so the limit is generous."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Engine:
    """A catalog with its queue and, when started, a supervisor: all real processes."""

    def __init__(self, url: str) -> None:
        self.catalog = Catalog(url)
        self.queue = Queue(self.catalog)

    def start(self, timing: Timing = QUICK) -> int:
        return ensure_supervisor(self.catalog.url, timing=timing, patience_s=60.0)

    def wait(self, job: Job) -> Job:
        return self.queue.wait(job.id, timeout_s=120.0)

    def scratch(self, job: Job, name: str) -> Path:
        return self.catalog.folder / "scratch" / job.id / name

    def running_pid(self, job: Job) -> int:
        """The pid of the job's worker, once it has said so."""
        until(lambda: self.queue.job(job.id).pid)
        pid = self.queue.job(job.id).pid
        assert pid is not None
        return pid

    def stop(self) -> None:
        """End everything this test started: the supervisor first, then every worker it may have left."""
        pid = supervisor_pid(self.catalog.url)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        for job in self.queue.jobs(1000):
            if job.pid is not None and job.state == "running":
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGKILL)
        self.catalog.close()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("SLIMSCOPE_TASKS", "sample_tasks")
    monkeypatch.delenv("SLIMSCOPE_WORKERS", raising=False)
    started = Engine(f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    yield started
    started.stop()


def gone(pid: int) -> bool:
    """Whether a process has ended (one that only waits to be reaped has)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
