"""Every way a child can fail is told to the caller, and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from core.errors import AnatomyMismatch, Cancelled, CannotOpen, OutOfMemory, SlimscopeError, WorkerDied
from core.inspector import Inspector, Ticket
from core.inspector import client as client_module
from core.types import ModelRef

FAULTS = "tests.inspector.faults:open_with_faults"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def inspector(tmp_path: Path) -> Iterator[Inspector]:
    inspector = Inspector(opener=FAULTS, log_path=tmp_path / "inspector.log")
    yield inspector
    inspector.close()


def fault(name: str) -> ModelRef:
    return ModelRef(f"fault:{name}")


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def hang(inspector: Inspector) -> Ticket:
    """A call that is certainly inside the child."""
    ticket = inspector.submit("open", fault("hang"))
    wait_for(lambda: ticket.progress.message == "hanging")
    return ticket


def test_segfault_names_the_signal_and_a_fresh_child_answers(inspector: Inspector) -> None:
    inspector.warm()
    before = inspector.pid
    with pytest.raises(WorkerDied, match=r"during open \(signal SIGSEGV\).*faults.py.*fresh one"):
        inspector.open(fault("segfault"))
    assert inspector.pid is None
    assert inspector.warm() == []
    assert inspector.pid not in (None, before)


def test_exit_names_the_code_and_the_last_words(inspector: Inspector) -> None:
    with pytest.raises(WorkerDied, match=r"exit code 3.*the last thing said"):
        inspector.open(fault("exit"))


def test_kill_9_in_the_middle_of_a_call(inspector: Inspector) -> None:
    ticket = hang(inspector)
    assert inspector.pid is not None
    os.kill(inspector.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL") as raised:
        ticket.result(timeout=60)
    assert not isinstance(raised.value, OutOfMemory)
    assert inspector.warm() == []


def test_kill_9_by_the_kernel_for_memory_is_told_apart(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = hang(inspector)
    assert inspector.pid is not None
    kills = client_module._kernel_oom_kills()
    monkeypatch.setattr(client_module, "_kernel_oom_kills", lambda: kills + 1)
    os.kill(inspector.pid, signal.SIGKILL)
    with pytest.raises(OutOfMemory, match="killed it for memory"):
        ticket.result(timeout=60)


def test_kill_9_between_calls_goes_unnoticed(inspector: Inspector) -> None:
    inspector.warm()
    killed = inspector.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: inspector.pid is None)
    assert inspector.warm() == []
    assert not psutil.pid_exists(killed), "the dead child must be reaped"


def test_memory_error_is_out_of_memory_and_the_child_lives(inspector: Inspector) -> None:
    inspector.warm()
    before = inspector.pid
    with pytest.raises(OutOfMemory, match=r"ran out of memory.*shorter prompt"):
        inspector.open(fault("memory"))
    assert inspector.pid == before


def test_torch_allocator_failure_is_out_of_memory(inspector: Inspector) -> None:
    with pytest.raises(OutOfMemory, match=r"ran out of memory"):
        inspector.open(fault("allocator"))


def test_a_defect_is_one_sentence_here_and_a_traceback_in_the_log(
    inspector: Inspector, tmp_path: Path
) -> None:
    with pytest.raises(SlimscopeError, match=r"ZeroDivisionError: one by nought.*traceback") as raised:
        inspector.open(fault("defect"))
    assert type(raised.value) is SlimscopeError
    log = (tmp_path / "inspector.log").read_text()
    assert "Traceback" in log
    assert "faults.py" in log


def test_a_refusal_keeps_its_type_and_sentence(inspector: Inspector) -> None:
    with pytest.raises(AnatomyMismatch, match=r"^no such module: model.layers.9$"):
        inspector.open(fault("refusal"))
    with pytest.raises(CannotOpen, match="not today") as raised:
        inspector.open(fault("private refusal"))
    assert type(raised.value) is CannotOpen, "an unknown type arrives as its nearest known base"


def test_cancelling_kills_what_runs_and_drops_what_waits(inspector: Inspector) -> None:
    running = hang(inspector)
    waiting = inspector.submit("open", fault("exit"))
    before = inspector.pid
    waiting.cancel()
    running.cancel()
    for ticket in (waiting, running):
        with pytest.raises(Cancelled):
            ticket.result(timeout=60)
    assert inspector.warm() == []
    assert inspector.pid != before


def test_progress_tells_state_share_and_time(inspector: Inspector) -> None:
    running = hang(inspector)
    waiting = inspector.submit("ping")
    assert (running.progress.state, running.progress.done, running.progress.total) == ("running", 1, 4)
    assert waiting.progress.state == "queued"
    assert running.progress.estimate_s is None
    elapsed = running.progress.elapsed_s
    with pytest.raises(TimeoutError, match="still running"):
        running.result(timeout=0.05)
    assert running.progress.elapsed_s > elapsed
    running.cancel()
    waiting.result(timeout=60)
    assert inspector.submit("ping").progress.estimate_s is not None


def test_the_child_outlives_the_thread_that_first_asked(inspector: Inspector) -> None:
    """Linux sends a parent-death signal when the spawning *thread* ends; pages run in short-lived threads."""
    thread = threading.Thread(target=inspector.warm)
    thread.start()
    thread.join()
    pid = inspector.pid
    time.sleep(0.3)
    assert inspector.pid == pid is not None


def test_close_kills_the_child_and_fails_what_waits(inspector: Inspector) -> None:
    running = hang(inspector)
    waiting = inspector.submit("ping")
    pid = inspector.pid
    assert pid is not None
    inspector.close()
    assert not psutil.pid_exists(pid)
    for ticket in (running, waiting, inspector.submit("ping")):
        with pytest.raises(Cancelled):
            ticket.result(timeout=60)


@pytest.mark.parametrize("in_call", [False, True], ids=["idle", "in a call"])
def test_no_orphan_when_the_parent_is_killed(tmp_path: Path, in_call: bool) -> None:
    script = f"""
import time
from pathlib import Path
from core.inspector import Inspector
from core.types import ModelRef
inspector = Inspector(opener={FAULTS!r}, log_path=Path({str(tmp_path / "log")!r}))
inspector.warm()
if {in_call}:
    ticket = inspector.submit("open", ModelRef("fault:hang"))
    while ticket.progress.message != "hanging":
        time.sleep(0.02)
print(inspector.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_for(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_the_client_never_imports_torch() -> None:
    script = """
import sys
from core.inspector import Inspector
inspector = Inspector(opener="tests.inspector.faults:open_with_faults")
inspector.warm()
inspector.close()
assert not {"torch", "transformers", "streamlit"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
