"""``slimscope run``, killed and interrupted on the way: nothing half-written is listed, what was proven is reused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from core.catalog.store import Catalog
from tests.faults.conftest import (
    EVALUATION,
    ROOT,
    RTN,
    SPEED,
    assert_whole,
    command_line,
    ended,
    family,
    half_written,
)
from tests.jobs.conftest import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Command:
    """One ``slimscope run`` of the tiny model, as a process of its own."""

    def __init__(self, place: Path, model: str) -> None:
        recipe = place / "recipe.json"
        recipe.write_text(json.dumps(RTN))
        evaluate = [f"--evaluate-set={key}={value}" for key, value in EVALUATION.items()]
        profile = [f"--profile-set={key}={value}" for key, value in SPEED.items()]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "core.cli",
                "run",
                str(recipe),
                "--model",
                model,
                "--json",
                *evaluate,
                *profile,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def child(self, name: str) -> list[psutil.Process]:
        """The command and what it started, once that is a process of this name."""

        def started() -> bool:
            assert self.process.poll() is None, self.process.communicate()[1]
            return any(name in command_line(p) for p in psutil.Process(self.process.pid).children())

        until(started, timeout_s=240.0)  # everything before it is done by then
        return family(self.process.pid)

    def stop(self, name: str, number: signal.Signals) -> tuple[int, str, str]:
        """Signal the command while its child of that name works; returns its exit code, stdout and stderr."""
        processes = self.child(name)
        os.kill(self.process.pid, number)
        out, err = self.process.communicate(timeout=120)
        until(lambda: all(ended(process) for process in processes))
        return self.process.returncode, out, err


@pytest.fixture
def run(place: Path, tiny: str) -> Iterator[Callable[[], Command]]:
    """Starts the command; none is left behind."""
    started: list[Command] = []

    def start() -> Command:
        started.append(Command(place, tiny))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()


STOPPED = "slimscope: stopped; what was finished is in the catalog\n"


def test_a_run_that_is_stopped_three_times(run: Callable[[], Command], fresh: Catalog) -> None:
    code, out, err = run().stop("fresh_load.py", signal.SIGINT)
    assert (code, out, err) == (130, "", STOPPED)
    assert half_written(fresh) == [], "an interrupted command cleans up"
    assert [variant.recipe for variant in fresh.variants()] == [None]

    code, out, _ = run().stop("fresh_load.py", signal.SIGKILL)
    assert (code, out) == (-9, "")
    assert [variant.recipe for variant in fresh.variants()] == [None], "only the base is listed"
    assert_whole(fresh)

    code, out, err = run().stop("core.profile.child", signal.SIGTERM)
    assert (code, out, err) == (130, "", STOPPED)
    (made,) = [variant for variant in fresh.variants() if variant.recipe]
    assert made.proven
    assert {run.kind for run in fresh.runs(made.id)} == {"compress", "proof", "evaluate"}
    assert_whole(fresh)

    out, err = run().process.communicate(timeout=300)
    answer = json.loads(out)
    assert (answer["variant"], answer["reused"]) == (made.id, True), err
    assert [run["kind"] for run in answer["runs"]] == ["evaluate", "profile"]
    values = [
        {m.name: m.value for m in run.measurements} for run in fresh.runs(made.id) if run.kind == "evaluate"
    ]
    assert values[0] == values[1], "measured again, the numbers are the same"
    assert_whole(fresh)
