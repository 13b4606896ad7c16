"""Kill the real worker in the middle of every step, and the supervisor beside it: the catalog ends up the same."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from core.catalog.store import Catalog
from core.jobs.lock import supervisor_pid
from core.jobs.queue import device_token
from core.types import Job
from tests.faults.conftest import (
    EVALUATION,
    RTN,
    SPEED,
    assert_whole,
    command_line,
    ended,
    family,
    half_written,
    measured,
    undisturbed,
)
from tests.jobs.conftest import Engine, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLAN = {
    "compress": {1: "quantizing", 2: "saving", 3: "proving", 4: "entering"},
    "evaluate": {1: "document 4", 2: "document 7"},
    "profile": {1: "measuring"},
}


class Held:
    """An engine whose tasks wait at the points of the plan."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder

    def reached(self, job: Job, attempt: int) -> list[psutil.Process]:
        """The worker and its children, once it stands at its point."""
        until((self.folder / f"{job.kind}-{attempt}").exists)
        return family(self.engine.running_pid(job))

    def release(self, job: Job, attempt: int) -> None:
        (self.folder / f"{job.kind}-{attempt}.go").touch()

    def kill(self, job: Job, attempt: int) -> list[str]:
        """Kill -9 the worker at its point; nobody it started stays behind, and nothing half-written.

        Returns the command lines of the processes that it had started.
        """
        processes = self.reached(job, attempt)
        commands = [command_line(process) for process in processes[1:]]
        os.kill(processes[0].pid, signal.SIGKILL)
        until(lambda: all(ended(process) for process in processes))
        until(lambda: self.engine.queue.job(job.id).state != "running" or self.attempt(job) > attempt)
        assert half_written(self.engine.catalog) == []
        assert_whole(self.engine.catalog)
        return commands

    def attempt(self, job: Job) -> int:
        return self.engine.queue.job(job.id).attempt


@pytest.fixture
def held(place: Path, monkeypatch: pytest.MonkeyPatch):
    folder = place / "hold"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(PLAN))
    monkeypatch.setenv("SLIMSCOPE_TASKS", "tests.faults.held_tasks")
    monkeypatch.setenv("SLIMSCOPE_HOLD", str(folder))
    engine = Engine(f"sqlite:///{place / 'catalog.sqlite'}")
    yield Held(engine, folder)
    engine.stop()


def test_killed_in_every_step_and_the_catalog_is_the_same(held: Held, place: Path, tiny: str) -> None:
    engine, queue, catalog = held.engine, held.engine.queue, held.engine.catalog
    first = engine.start()
    subject = {"model": tiny, "recipe": RTN}
    compress = queue.submit("compress", subject)
    evaluate = queue.submit(
        "evaluate",
        {**subject, "method": None, "settings": EVALUATION, "documents": {"source": "pydoc"}},
        depends_on=compress.id,
    )
    profile = queue.submit(
        "profile",
        {**subject, "method": "torch_eager", "settings": SPEED},
        depends_on=evaluate.id,
        token=device_token(),
    )

    held.kill(compress, 1)
    assert any("its worker was killed, exit code -9" in event for event in queue.events(compress.id))
    held.reached(compress, 2)  # tried again by itself
    half = list(half_written(catalog)[0].rglob("model.safetensors"))
    assert half, "the weight file is there to its half"
    held.kill(compress, 2)
    assert engine.wait(compress).state == "lost"
    assert queue.job(evaluate.id).state == "cancelled", "what waits for it says so"
    assert [variant.recipe for variant in catalog.variants()] == [None], "only the base is listed"

    queue.retry(compress.id)
    (proving,) = held.kill(compress, 3)
    assert "fresh_load.py" in proving, "the proof's own process was there, and died"
    assert [variant.recipe for variant in catalog.variants()] == [None]
    held.kill(compress, 4)
    (unfinished,) = [variant for variant in catalog.variants() if variant.recipe]
    assert not unfinished.proven, "without its proof in the catalog it does not count as proven"
    queue.retry(compress.id)
    assert engine.wait(compress).state == "succeeded"

    held.kill(evaluate, 1)
    (worker, *_) = held.reached(evaluate, 2)
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor_pid(catalog.url) is None)
    assert not ended(worker), "the worker outlives the supervisor"
    assert engine.start() != first
    held.release(evaluate, 2)
    done = engine.wait(evaluate)
    assert (done.state, done.attempt, done.pid) == ("succeeded", 2, worker.pid), (
        "the next supervisor adopted it"
    )
    scored = Counter((held.folder / "scored").read_text().split())
    assert scored == Counter(str(n) for n in range(EVALUATION["max_documents"])), "each document once, in all"

    (measuring,) = held.kill(profile, 1)
    assert "core.profile.child" in measuring, "the measuring process was there, and died"
    ran = engine.wait(profile)
    assert (ran.state, ran.attempt) == ("succeeded", 2)

    assert_whole(catalog)
    assert_same(catalog, *undisturbed(place, tiny))


def assert_same(catalog: Catalog, reference: Catalog, id_: str) -> None:
    """Same variant, same artifact, same numbers, each step's result once."""
    ours, theirs = catalog.variant(id_), reference.variant(id_)
    assert ours.artifact == theirs.artifact
    assert (ours.fingerprint, ours.bytes, ours.proven) == (theirs.fingerprint, theirs.bytes, True)
    runs = {run.kind: run for run in catalog.runs(id_)}
    expected = {run.kind: run for run in reference.runs(id_)}
    assert measured(runs["evaluate"]) == measured(expected["evaluate"])
    assert measured(runs["evaluate"])["kl"]
    kinds = Counter(run.kind for run in catalog.runs(id_))
    assert kinds == {"compress": 2, "proof": 1, "evaluate": 1, "profile": 1}, (
        "compress again after `entering`"
    )
    assert {v.id for v in catalog.variants()} == {v.id for v in reference.variants()}
