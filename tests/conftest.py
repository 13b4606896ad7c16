"""The one Chromium of a test session, since Playwright cannot be started twice in a process; patient threads; turns; and long files first.

Tests marked ``rotating`` take turns: each day runs a quarter of them, chosen by name, so that all have run after four
days. ``SLIMSCOPE_ROTATION`` names a turn (0 to 3) or ``all``.

Tests share the cores with the dashboards, inspectors and workers that they start: torch's threads must sleep while
they wait, as ``core.lazy`` has it, also where a test imports torch before core.
"""

from __future__ import annotations

import datetime
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TURNS = 4
SECONDS = {"browser": 30, "slow": 20}
"""What a test of this mark takes, roughly."""
PROCESSES = {"faults", "jobs", "inspector", "test_cli.py", "test_loop.py", "test_sweep.py"}
"""Tests that start processes of their own, marked or not."""


def pytest_report_header() -> str:
    return f"rotating tests: turn {_turn()} of {TURNS}; SLIMSCOPE_ROTATION=all runs every one"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out whose turn it is not, and put the files that take longest first.

    A long file that is begun last keeps one worker busy while the others have nothing left to do.
    """
    _leave_out(config, items)
    seconds: Counter[Path] = Counter()
    for item in items:
        marked = [took for mark, took in SECONDS.items() if item.get_closest_marker(mark)]
        seconds[item.path] += max([*marked, 5 * any(part in PROCESSES for part in item.path.parts), 1])
    items.sort(key=lambda item: -seconds[item.path])  # stable: a file's tests stay together and in order


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whose turn it is not waits; a test that was named on the command line is always run."""
    turn = _turn()
    if turn == "all" or any("::" in argument for argument in config.args):
        return
    waiting = [item for item in items if item.get_closest_marker("rotating") and _turn_of(item) != turn]
    if waiting:
        config.hook.pytest_deselected(items=waiting)
        left_out = {item.nodeid for item in waiting}
        items[:] = [item for item in items if item.nodeid not in left_out]


def _turn() -> str:
    return os.environ.get("SLIMSCOPE_ROTATION") or str(datetime.date.today().toordinal() % TURNS)


def _turn_of(item: pytest.Item) -> str:
    return str(zlib.crc32(item.nodeid.encode()) % TURNS)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """The command line names its catalog in the environment; no test may leave one to the next."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium found; install it or set CHROMIUM")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
