"""Workers as processes of this machine, each the leader of its own session and process group.

A worker is named by its pid and its time of creation together, so that a process that was given the same pid
later is never taken for it, and never signalled. Knows no table.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from core.types import Job

CLOCK_SLACK_S = 2.0
"""The system computes a process's creation from the wall clock, which may be corrected in between."""


@dataclass(frozen=True)
class Worker:
    """One worker process, of this supervisor or of an earlier one."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> Worker:
        """The process that has this pid now."""
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """Whether this very process still runs."""
        try:
            process = psutil.Process(self.pid)
            return self._is(process) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def signal_group(self, number: signal.Signals) -> bool:
        """Send a signal to every process of the worker's group, also when the worker itself is gone already."""
        if not self._group():
            return False
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _is(self, process: psutil.Process) -> bool:
        return abs(process.create_time() - self.created) < CLOCK_SLACK_S

    def _group(self) -> list[int]:
        """Living members; none when the pid was given to another process, for then the group is another one too."""
        members = []
        for process in psutil.process_iter():
            try:
                if process.pid == self.pid and not self._is(process):
                    return []
                if os.getpgid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    members.append(process.pid)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        return members


class LocalExecutor:
    """Starts workers here and reaps them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._children: dict[str, tuple[subprocess.Popen[bytes], Worker]] = {}

    def start(self, job: Job) -> None:
        """Spawn the worker of a claimed job; its output is appended to the job's log. Raises ``OSError``."""
        log = Path(job.log_path)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "core.jobs.worker", job.id],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # By the environment, not as an argument: the URL may hold a password, and everyone can list arguments.
                env={**os.environ, "SLIMSCOPE_CATALOG": self._url, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self._children[job.id] = (process, Worker.of(process.pid))

    def worker(self, job_id: str) -> Worker | None:
        """The worker of a job if this executor started it and has not reaped it."""
        child = self._children.get(job_id)
        return None if child is None else child[1]

    def reap(self) -> dict[str, int]:
        """Exit codes by job of the workers that ended since the last call; what they left in their group is killed."""
        ended: dict[str, int] = {}
        for job_id, (process, worker) in list(self._children.items()):
            code = process.poll()
            if code is not None:
                worker.signal_group(signal.SIGKILL)
                ended[job_id] = code
                del self._children[job_id]
        return ended

    @property
    def job_ids(self) -> frozenset[str]:
        """Jobs whose workers have not been reaped yet."""
        return frozenset(self._children)
