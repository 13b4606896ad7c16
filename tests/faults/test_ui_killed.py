"""The dashboard's process killed while a job runs and a model opens: jobs go on, its inspector ends, nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import psutil
import pytest

from core.errors import WorkerDied
from core.inspector import Inspector
from core.jobs.lock import supervisor_pid
from core.types import ModelRef, Prompt
from tests.faults.conftest import ROOT, RTN, assert_whole, command_line, ended
from tests.jobs.conftest import Engine, until


@pytest.mark.slow
def test_an_inspector_killed_in_a_probe_is_one_error_and_the_next_call_answers(
    place: Path, tiny: str
) -> None:
    model, prompt = ModelRef(tiny), Prompt("One two three four five six seven.")
    inspector = Inspector(log_path=place / "inspector.log")
    try:
        inspector.open(model)
        first = inspector.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)  # so that the probe is certainly under way
        ticket = inspector.submit("probe", "logit_lens", model, prompt, {})
        until(lambda: ticket.progress.state == "running")
        os.kill(first, signal.SIGKILL)
        with pytest.raises(
            WorkerDied, match=r"died during probe \(signal SIGKILL\).*the next call starts a fresh one"
        ):
            ticket.result(timeout=60)
        assert len(inspector.probe("logit_lens", model, prompt).frame)
        assert inspector.pid not in (None, first)
        assert not psutil.pid_exists(first)
    finally:
        inspector.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def dashboard(place: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``slimscope ui`` as a process, once it answers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (place / "ui.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "core.cli", "ui", "--port", str(port)], cwd=ROOT, stdout=log, stderr=log
        )

    def answers() -> bool:
        assert process.poll() is None, (place / "ui.log").read_text()
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=5):
                return True
        except OSError:
            return False

    try:
        until(answers)
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def page(browser) -> Iterator[object]:
    opened = browser.new_page()
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.browser
def test_a_dashboard_killed_in_the_middle(
    place: Path, tiny: str, page, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "hold").mkdir()
    (place / "hold" / "plan.json").write_text(json.dumps({"compress": {1: "quantizing"}}))
    monkeypatch.setenv("SLIMSCOPE_TASKS", "tests.faults.held_tasks")
    monkeypatch.setenv("SLIMSCOPE_HOLD", str(place / "hold"))
    engine = Engine(f"sqlite:///{place / 'catalog.sqlite'}")
    try:
        with dashboard(place) as (server, url):
            daemon = supervisor_pid(engine.catalog.url)
            assert daemon is not None, "the dashboard started it"
            job = engine.queue.submit("compress", {"model": tiny, "recipe": RTN})
            until((place / "hold" / "compress-1").exists)
            page.goto(f"{url}/inspect?{urlencode({'model': tiny})}")

            def inspectors() -> list[psutil.Process]:
                children = psutil.Process(server.pid).children(recursive=True)
                return [child for child in children if "core.inspector.child" in command_line(child)]

            until(inspectors)
            (inspector,) = inspectors()
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
            until(lambda: ended(inspector))
        assert supervisor_pid(engine.catalog.url) == daemon
        (place / "hold" / "compress-1.go").touch()
        done = engine.wait(job)
        assert (done.state, done.attempt) == ("succeeded", 1)
        assert_whole(engine.catalog)
        with dashboard(place) as (server, url):
            page.goto(f"{url}/jobs?job={job.id}")
            page.get_by_text("succeeded", exact=False).first.wait_for(timeout=60_000)
            assert supervisor_pid(engine.catalog.url) == daemon, "the one that lives is found, no second one"
    finally:
        engine.stop()
