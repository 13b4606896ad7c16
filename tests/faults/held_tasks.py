"""The real tasks, held at a named point until they are let go or killed; named to the worker by ``SLIMSCOPE_TASKS``.

The folder ``SLIMSCOPE_HOLD`` has ``plan.json``: ``{kind: {attempt: point}}``. A process that reaches its point
creates the file ``KIND-ATTEMPT`` there and waits for the file ``KIND-ATTEMPT.go``. Every document that was scored is
one line in ``scored``.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.jobs import tasks
from core.jobs.context import Task, TaskContext

PATIENCE_S = 120.0
MESSAGES = {
    "quantizing": "rounding .*layers.1.",
    "proving": "reloading in a fresh process",
    "document 4": "document 4 of",
    "document 7": "document 7 of",
    "measuring": "warming up|samples",
}
"""Points that are progress messages; ``saving`` and ``entering`` are places in the code."""


def held(task: Task) -> Task:
    """The task, with a hold at the point that the plan names for this attempt."""

    def run(spec: dict[str, Any], context: TaskContext) -> dict[str, Any]:
        folder = Path(os.environ["SLIMSCOPE_HOLD"])
        plan = json.loads((folder / "plan.json").read_text())
        point = plan.get(context.job.kind, {}).get(str(context.job.attempt), "")
        hold = Hold(folder / f"{context.job.kind}-{context.job.attempt}")
        if point == "saving":
            save_half(hold)
        elif point == "entering":
            hold_before_the_proof_is_entered(hold)
        note_scored_documents(folder / "scored")

        def progress(done: float, total: float, message: str) -> None:
            context.progress(done, total, message)
            if point in MESSAGES and re.search(MESSAGES[point], message):
                hold()

        return task(spec, replace(context, progress=progress))

    return run


class Hold:
    """Waits once."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __call__(self) -> None:
        if self._marker.exists():
            return
        self._marker.touch()
        deadline = time.monotonic() + PATIENCE_S
        while not self._marker.with_suffix(".go").exists():
            assert time.monotonic() < deadline, "nobody came"
            time.sleep(0.02)


def save_half(hold: Callable[[], None]) -> None:
    """Let the weight file be written to its half."""
    import safetensors.torch

    write = safetensors.torch.save_file

    def save_file(tensors: Any, filename: Path, metadata: Any = None) -> None:
        write(tensors, filename, metadata=metadata)
        os.truncate(filename, filename.stat().st_size // 2)
        hold()

    safetensors.torch.save_file = save_file


def hold_before_the_proof_is_entered(hold: Callable[[], None]) -> None:
    """Between two transactions: the variant and what was done to it are in the catalog, its proof is not."""
    from core.catalog.store import Catalog

    record = Catalog.record_run

    def record_run(self: Catalog, run: Any, **rest: Any) -> Any:
        if run.kind == "proof":
            hold()
        return record(self, run, **rest)

    Catalog.record_run = record_run  # type: ignore[method-assign]


def note_scored_documents(file: Path) -> None:
    """Write down which documents were really run through the models."""
    from core.evaluate import language_modelling

    score = language_modelling.score_document

    def score_document(*arguments: Any, document: int, **rest: Any) -> Any:
        scored = score(*arguments, document=document, **rest)
        with file.open("a") as lines:
            lines.write(f"{document}\n")
        return scored

    language_modelling.score_document = score_document


TASKS = {kind: held(task) for kind, task in tasks.TASKS.items()}
