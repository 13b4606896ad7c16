"""A real server in its own process on a catalog of its own, and a real Chromium that may talk to nobody else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.catalog.store import Catalog
from core.jobs.lock import supervisor_pid
from tests.app.measured import recorded
from tests.synthetic import fill

playwright = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).resolve().parents[2]
OWN = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One running dashboard."""

    def __init__(self, url: str, pid: int, home: Path) -> None:
        self.url, self.pid, self.home = url, pid, home


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    with dashboard(tmp_path_factory.mktemp("slimscope")) as running:
        yield running


@pytest.fixture
def fresh_server(tmp_path) -> Iterator[Server]:
    """A dashboard that no other test has used."""
    with dashboard(tmp_path) as running:
        yield running


@contextmanager
def dashboard(home: Path) -> Iterator[Server]:
    port = free_port()
    environment = {**os.environ, "SLIMSCOPE_HOME": str(home), "SLIMSCOPE_CATALOG": "", "OMP_NUM_THREADS": "2"}
    log = (home / "server.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "app.server", "--port", str(port)],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, (home / "server.log").read_text()
                time.sleep(0.1)
        yield Server(url, process.pid, home)
    finally:
        process.terminate()
        process.wait(15)
        daemon = supervisor_pid(f"sqlite:///{home / 'catalog.sqlite'}")
        if daemon is not None:
            os.kill(daemon, signal.SIGTERM)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    from tests.tiny import tiny_folder

    return str(tiny_folder("llama", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tradeoffs(server) -> str:
    """The address of Trade-offs on a base with twenty invented variants."""
    base = fill(Catalog(f"sqlite:///{server.home / 'catalog.sqlite'}"), 20)
    return f"{server.url}/tradeoffs?base={base.id}"


@pytest.fixture(scope="session")
def measured(server) -> str:
    """The path of Profile on recorded measurements of a tiny model."""
    found = recorded(Catalog(f"sqlite:///{server.home / 'catalog.sqlite'}"), str(server.home / "tiny"))
    return f"/profile?base={found.base.id}"


@pytest.fixture
def page(browser) -> Iterator[playwright.Page]:
    """A fresh page at 1440×900; fails on any script error and on any request to another machine."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: None if request.url.startswith(OWN) else wrong.append(request.url))
    yield opened
    context.close()
    assert not wrong, wrong
