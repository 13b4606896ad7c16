"""Kill each process at its work: nothing finished is lost, nothing is run twice, nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from core.errors import WorkerDied
from core.jobs.lock import supervisor_pid
from core.jobs.logs import tail
from core.jobs.queue import device_token
from core.jobs.supervisor import ensure_supervisor
from tests.jobs.conftest import QUICK, Engine, gone, until

pytestmark = pytest.mark.slow
LONG = {"n": 40, "pause_s": 0.1}


def test_a_killed_worker_is_replaced_and_goes_on_where_it_was(engine: Engine) -> None:
    engine.start()
    job = engine.queue.submit("count", LONG)
    pid = engine.running_pid(job)
    until(engine.scratch(job, "4.done").exists)
    os.kill(pid, signal.SIGKILL)
    ended = engine.wait(job)
    assert (ended.state, ended.attempt) == ("succeeded", 2)
    assert ended.result["counted"] == 40
    assert ended.result["started_from"] >= 5
    assert ended.result["pid"] != pid
    lost = next(line for line in engine.queue.events(job.id) if " lost " in line)
    assert "exit code -9: probably by the system, for lack of memory (it last held" in lost
    assert "starting from 0" in lost, "its last log lines are told"
    until(lambda: not engine.scratch(job, "").exists())  # after success is written down, so a moment later


def test_a_killed_supervisor_is_replaced_and_adopts_the_worker(engine: Engine) -> None:
    first = engine.start()
    job = engine.queue.submit("count", LONG)
    pid = engine.running_pid(job)
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor_pid(engine.catalog.url) is None)
    assert not gone(pid)
    assert engine.start() != first
    ended = engine.wait(job)
    assert (ended.state, ended.attempt, ended.result["pid"]) == ("succeeded", 1, pid)
    until(lambda: gone(pid))


def test_supervisor_and_worker_killed_together(engine: Engine) -> None:
    first = engine.start()
    job = engine.queue.submit("count", LONG)
    pid = engine.running_pid(job)
    until(engine.scratch(job, "2.done").exists)
    os.kill(first, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    until(lambda: gone(pid) and supervisor_pid(engine.catalog.url) is None)
    engine.start()
    ended = engine.wait(job)
    assert (ended.state, ended.attempt) == ("succeeded", 2)
    assert ended.result["started_from"] >= 3


def test_an_adopted_worker_that_will_not_stop_is_killed_with_its_group(engine: Engine) -> None:
    first = engine.start()
    job = engine.queue.submit("deaf", {})
    pid = engine.running_pid(job)
    until(engine.scratch(job, "grandchild").exists)
    until(lambda: engine.scratch(job, "grandchild").read_text())
    grandchild = int(engine.scratch(job, "grandchild").read_text())
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor_pid(engine.catalog.url) is None)
    engine.start()
    engine.queue.cancel(job.id)
    assert engine.wait(job).state == "cancelled"
    until(lambda: gone(pid) and gone(grandchild))


def test_cancel_is_gentle_first_and_keeps_the_scratch_for_a_retry(engine: Engine) -> None:
    engine.start()
    job = engine.queue.submit("count", LONG)
    until(engine.scratch(job, "2.done").exists)
    engine.queue.cancel(job.id)
    ended = engine.wait(job)
    assert (ended.state, ended.exit_code, ended.error) == ("cancelled", 0, ""), "it ended by itself"
    assert ended.done < 40
    engine.queue.retry(job.id)
    again = engine.wait(job)
    assert again.state == "succeeded"
    assert again.result["started_from"] >= 3


def test_a_paused_job_stops_at_its_next_report_and_goes_on_when_resumed(engine: Engine) -> None:
    engine.start()
    job = engine.queue.submit("count", LONG)
    until(engine.scratch(job, "2.done").exists)
    engine.queue.pause(job.id)
    paused = engine.wait(job)
    assert (paused.state, paused.error, paused.pause_requested) == ("paused", "", False)
    until(lambda: gone(paused.pid or 0))
    finished = len(list(engine.scratch(job, "").iterdir()))
    engine.queue.resume(job.id)
    again = engine.wait(job)
    assert (again.state, again.attempt) == ("succeeded", 2)
    assert again.result["started_from"] == finished


def test_cancel_kills_a_deaf_worker_and_its_grandchildren(engine: Engine) -> None:
    engine.start()
    job = engine.queue.submit("deaf", {})
    pid = engine.running_pid(job)
    until(
        lambda: engine.scratch(job, "grandchild").exists() and engine.scratch(job, "grandchild").read_text()
    )
    grandchild = int(engine.scratch(job, "grandchild").read_text())
    engine.queue.cancel(job.id)
    ended = engine.wait(job)
    assert (ended.state, ended.exit_code) == ("cancelled", -9)
    until(lambda: gone(pid) and gone(grandchild))


def test_a_worker_without_sign_of_life_is_killed_and_replaced(engine: Engine) -> None:
    engine.start(replace(QUICK, stale_s=8.0))
    job = engine.queue.submit("frozen", {})
    pid = engine.running_pid(job)
    ended = engine.wait(job)
    assert (ended.state, ended.result) == ("succeeded", {"attempt": 2})
    assert gone(pid)
    assert any("no sign of life for 8 s" in line for line in engine.queue.events(job.id))


def test_a_worker_whose_job_was_given_away_ends_by_itself(engine: Engine) -> None:
    engine.start()
    job = engine.queue.submit("count", {"n": 1000, "pause_s": 0.1})
    pid = engine.running_pid(job)
    os.kill(supervisor_pid(engine.catalog.url) or 0, signal.SIGKILL)
    with engine.catalog.write() as session:
        from core.jobs import ledger

        ledger.lose(session, ledger.get(session, job.id), "thought dead", exit_code=None)
    until(lambda: gone(pid))
    assert "given to another worker" in tail(job.log_path)[-1]


def test_there_is_one_supervisor_and_it_is_nobodys_child(engine: Engine) -> None:
    pid = engine.start()
    assert engine.start() == pid
    second = subprocess.run(
        [sys.executable, "-m", "core.jobs.supervisor"],
        env={**os.environ, "SLIMSCOPE_CATALOG": engine.catalog.url},
        timeout=90,
        check=False,
    )
    assert second.returncode == 0, "a second one finds the first and leaves"
    assert supervisor_pid(engine.catalog.url) == pid
    assert psutil.Process(pid).ppid() != os.getpid()
    assert os.getsid(pid) != os.getsid(0), "closing the terminal, or killing the UI, does not reach it"


def test_a_supervisor_that_cannot_start_says_why(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSCOPE_WORKERS", "many")
    with pytest.raises(WorkerDied, match="SLIMSCOPE_WORKERS is 'many'"):
        ensure_supervisor(engine.catalog.url, patience_s=20.0)


def test_an_idle_supervisor_ends_and_the_next_submit_starts_another(engine: Engine) -> None:
    first = engine.start(replace(QUICK, idle_s=0.5))
    until(lambda: supervisor_pid(engine.catalog.url) is None)
    until(lambda: gone(first))
    job = engine.queue.submit("count", {"n": 1})
    engine.start()
    assert engine.wait(job).state == "succeeded"


def test_errors_are_one_sentence_and_the_log_has_the_rest(engine: Engine) -> None:
    engine.start()
    jobs = {
        "wrong": engine.queue.submit("wrong", {}),
        "broken": engine.queue.submit("broken", {"zero": 0}),
        "unknown": engine.queue.submit("no such task", {}),
        "leaver": engine.queue.submit("leaver", {"code": 3}),
    }
    ended = {name: engine.wait(job) for name, job in jobs.items()}
    assert {job.state for name, job in ended.items() if name != "leaver"} == {"failed"}
    assert ended["wrong"].error == "group_size 7 does not divide 64; choose 32 or 64"
    assert ended["broken"].error == "ZeroDivisionError: division by zero; see the log"
    assert "Traceback" in "\n".join(tail(ended["broken"].log_path))
    assert ended["unknown"].error.startswith("no task is called 'no such task'; there are: broken, ")
    assert (ended["leaver"].state, ended["leaver"].attempt, ended["leaver"].exit_code) == ("lost", 2, 3)
    assert "ended with exit code 3 before it gave an answer; last lines" in ended["leaver"].error
    assert "last words" in ended["leaver"].error


def test_a_mended_predecessor_brings_its_dependants_back(engine: Engine, tmp_path) -> None:
    engine.start()
    mended = tmp_path / "mended"
    first = engine.queue.submit("wrong", {"mended": str(mended)})
    second = engine.queue.submit("count", {"n": 1}, depends_on=first.id)
    assert engine.wait(first).state == "failed"
    assert engine.wait(second).state == "cancelled"
    mended.touch()
    engine.queue.retry(first.id)
    assert engine.wait(first).state == "succeeded"
    assert engine.wait(second).state == "succeeded"


def test_a_job_with_a_token_runs_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMSCOPE_WORKERS", "3")
    engine.start()
    tokens = [None, None, device_token(), None, None]
    jobs = [engine.queue.submit("count", {"n": 8, "pause_s": 0.1}, token=token) for token in tokens]
    ended = [engine.wait(job) for job in jobs]
    assert {job.state for job in ended} == {"succeeded"}
    alone = ended[2]

    def overlaps(one, other) -> bool:
        return one.started_at < other.ended_at and other.started_at < one.ended_at

    assert not any(overlaps(alone, job) for job in ended if job is not alone)
    assert overlaps(ended[0], ended[1]), "the others do share the host"
    assert not psutil.pid_exists(alone.pid or 0), "its worker was reaped"
