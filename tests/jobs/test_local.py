from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from core.jobs.executors.local import Worker
from tests.jobs.conftest import gone, until

GROUP = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def leader() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", GROUP], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_process_with_a_recycled_pid_is_never_signalled(leader: subprocess.Popen[str]) -> None:
    now = Worker.of(leader.pid)
    before = Worker(leader.pid, now.created - 100)  # who had this pid earlier
    assert now.alive()
    assert not before.alive()
    assert not before.signal_group(signal.SIGKILL)
    assert leader.poll() is None


def test_the_group_is_killed_also_after_its_leader_died(leader: subprocess.Popen[str]) -> None:
    assert leader.stdout is not None
    grandchild = int(leader.stdout.readline())
    worker = Worker.of(leader.pid)
    leader.kill()
    leader.wait()
    assert not worker.alive()
    assert not gone(grandchild)
    assert worker.signal_group(signal.SIGKILL)
    until(lambda: gone(grandchild))
    assert not worker.signal_group(signal.SIGKILL), "nobody is left"
