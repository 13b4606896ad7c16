"""Grids and races as jobs: specs, tokens, groups; and a race through its task."""

from __future__ import annotations

import pytest

from core import errors
from core.catalog.store import Catalog
from core.jobs.context import TaskContext
from core.jobs.profile_plan import submit_profiles, submit_race
from core.jobs.queue import Queue, device_token
from core.jobs.tasks import TASKS
from core.loop import register
from core.profile.grid import cells
from core.types import silent
from tests.tiny import tiny_folder


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Queue:
    monkeypatch.setenv("SLIMSCOPE_HOME", str(tmp_path / "home"))
    return Queue(Catalog(f"sqlite:///{tmp_path / 'home' / 'catalog.sqlite'}"))


@pytest.fixture
def variant(queue, tmp_path) -> str:
    return register(queue.catalog, str(tiny_folder("smollm", tmp_path / "tiny"))).id


def test_each_cell_is_a_job_alone_on_its_host_and_queued_once(queue, variant):
    grid = cells(queue.catalog, [variant], threads=[1, 2], others={"tier": ["rapid"]})
    jobs = submit_profiles(queue, grid)
    assert [job.kind for job in jobs] == ["profile", "profile"]
    assert [job.spec["settings"]["threads"] for job in jobs] == [1, 2]
    assert len({job.group_id for job in jobs}) == 1
    assert {_token(queue, job.id) for job in jobs} == {device_token()}
    assert [job.id for job in submit_profiles(queue, grid)] == [job.id for job in jobs]


def test_nothing_to_do_is_said(queue, tmp_path):
    encoder = register(queue.catalog, str(tiny_folder("bert", tmp_path / "bert"))).id
    refused = cells(queue.catalog, [encoder], ["llama_cpp"])
    with pytest.raises(errors.BadInput, match=r"nothing to measure: \S"):
        submit_profiles(queue, refused)


def test_a_race_that_cannot_be_is_refused_when_it_is_submitted(queue, variant):
    with pytest.raises(errors.BadInput):
        submit_race(queue, variant, "no such variant")
    with pytest.raises(errors.BadSettings):
        submit_race(queue, variant, variant, settings_b={"threads": -1})
    with pytest.raises(errors.UnknownMethod):
        submit_race(queue, variant, variant, runtime_b="no_such_runtime")


@pytest.mark.slow
@pytest.mark.rotating
def test_jobs_become_runs_that_name_them(queue, variant, tmp_path):
    small = {"tier": "rapid", "prompt_tokens": 16, "new_tokens": 4, "threads": 1, "parity": False}
    raced = submit_race(queue, variant, variant, settings_a=small, settings_b=small, blocks=8)
    assert _token(queue, raced.id) == device_token()
    others = {name: [value] for name, value in small.items()}
    (cell,) = submit_profiles(queue, cells(queue.catalog, [variant], others=others))
    for job in (raced, cell):
        said: list[str] = []
        TASKS[job.kind](dict(job.spec), TaskContext(queue.catalog, silent, job, tmp_path, said.append))
        assert said
    runs = {run.kind: run for run in queue.catalog.runs(variant)}
    assert (runs["race"].job_id, runs["profile"].job_id) == (raced.id, cell.id)
    assert runs["profile"].conditions["headline"] is False
    assert cells(queue.catalog, [variant], others=others)[0].measured_run == runs["profile"].id


def _token(queue: Queue, id_: str) -> str | None:
    from core.catalog.tables import JobRow

    with queue.catalog.read() as session:
        row = session.get(JobRow, id_)
        return row.token if row else None
