"""Specs of ``core.jobs.plan`` through the tasks that read them, on a tiny model."""

from __future__ import annotations

from pathlib import Path

from core.catalog.store import Catalog
from core.jobs.context import TaskContext
from core.jobs.plan import submit_variant
from core.jobs.queue import Queue
from core.jobs.tasks import TASKS
from core.recipe import Recipe
from core.types import silent
from tests.tiny import tiny_folder


def test_one_click_ends_in_runs_that_name_their_jobs(tmp_path: Path):
    catalog = Catalog(f"sqlite:///{tmp_path / 'home' / 'catalog.sqlite'}")
    text = tmp_path / "own.txt"
    text.write_text("\n\n".join(f"Paragraph {i}. " + "One two three four five. " * 40 for i in range(60)))
    jobs = submit_variant(
        Queue(catalog),
        model=str(tiny_folder("smollm", tmp_path / "tiny")),
        recipe=Recipe.of("rtn", bits=8, group_size="channel"),
        evaluate={"documents": {"source": str(text)}, "settings": {"max_documents": 2}},
        profile={"settings": {"tier": "rapid", "prompt_tokens": 32, "new_tokens": 4}},
    )
    assert [job.kind for job in jobs] == ["compress", "evaluate", "profile", "evaluate", "profile"]
    for job in jobs[:2]:
        said: list[str] = []
        TASKS[job.kind](dict(job.spec), TaskContext(catalog, silent, job, tmp_path, said.append))
        assert said
    variant = next(v for v in catalog.variants() if v.recipe is not None)
    assert variant.proven
    assert {run.kind: run.job_id for run in catalog.runs(variant.id)} == {
        "compress": jobs[0].id,
        "proof": jobs[0].id,
        "evaluate": jobs[1].id,
    }
