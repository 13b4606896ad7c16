"""A training as a recipe's step: from a model and an aim to the result of ``distil`` and ``fine_tune``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from core.distill.held_out import HeldOut, measure
from core.distill.material import Material
from core.distill.moved import copies, moved
from core.distill.objective import Objective
from core.distill.outcome import frames, metrics, sentences, views
from core.distill.processes import Processes
from core.distill.samples import continuations
from core.distill.settings import TrainingSettings
from core.distill.trainable.prepare import prepare
from core.distill.trainer import Job, Trained, train
from core.lazy import torch
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.saving.report import headline
from core.types import Cost, Metric, Progress, Provenance, Result, part_of

Aim = Callable[[], Objective]
"""Makes the objective for the model as it is now."""
Taught = Callable[[Progress], tuple[Aim, tuple[str, ...]]]
"""What is aimed at, and notes; a teacher may read all rows for it, which takes hours."""


def trained_result(
    method: str,
    loaded: LoadedModel,
    taught: Taught,
    read: Material,
    progress: Progress,
    scratch: Path | None,
    settings: TrainingSettings,
    *,
    inputs: Mapping[str, str],
    notes: tuple[str, ...] = (),
    teaching: float = 0.0,
) -> Result:
    """Train, leave in the model what a reload will give, measure that, and tell.

    What cannot be trained is refused before ``taught`` is called. ``inputs`` are fingerprints of what the training depends
    on beside data and settings; ``teaching`` is the share of ``progress`` that ``taught`` gets. Hold the models' locks.
    """
    started = time.monotonic()
    processes = Processes()
    with torch.inference_mode(False):
        before = copies(loaded)
        trainable = prepare(loaded, settings)
        aim, said = taught(part_of(progress, 0.0, teaching))
        objective = aim()
        sampled = list(range(min(settings.samples, read.held_out.n_rows)))
        job = Job(loaded, objective, read.training, read.held_out, trainable, settings)
        trained = train(
            job, scratch=scratch, progress=part_of(progress, teaching, 0.95), inputs=list(inputs.values()),
            sampler=partial(continuations, loaded, read.held_out, sampled) if sampled else None, processes=processes,
        )  # fmt: skip
        finished = trainable.finish(loaded)
        after = _measured(aim(), read, trained, part_of(progress, 0.95, 1.0), processes)
        frame = moved(loaded, before, stayed=_why_stayed(trained, settings))
    found = frames(trained, after)
    return Result(
        {"main": frame, **found},
        views(found, chosen_by=objective.chosen_by),
        (*metrics(trained.before, after, seed=settings.seed), *_amounts(trained), *headline(frame)),
        Provenance(
            method, settings.model_dump(mode="json"), loaded.fingerprint,
            inputs={**inputs, "training": read.training.fingerprint, "held_out": read.held_out.fingerprint},
            dtype=settings.precision, device=str(processes.device),
            conditions={
                "tokens": trained.position.tokens, "best_tokens": trained.position.best_tokens,
                "updates": trained.position.update, "stopped": trained.stopped, "processes": processes.n,
            },
            seconds=time.monotonic() - started,
        ),
        (*sentences(trained, after, chosen_by=objective.chosen_by, seed=settings.seed), *finished, *said, *notes),
    )  # fmt: skip


def training_cost(anatomy: Anatomy, n_tokens: int, settings: TrainingSettings, *, teacher: bool) -> Cost:
    """Forward passes over windows (a backward pass counts as two), and five float32 copies of what moves: gradient,
    two moments, the best so far, and what it was."""
    windows = settings.max_tokens / settings.window
    parameters = anatomy.vocab_size * anatomy.d_model + anatomy.n_layers * (
        4 * anatomy.d_model**2 + 3 * anatomy.d_model * anatomy.d_ff * max(1, anatomy.n_experts)
    )
    moving = parameters if settings.train in ("all", "straight_through") else parameters // 20
    return Cost(windows * (3 + teacher), 4 * (parameters + 4 * moving))


def _measured(
    objective: Objective, read: Material, trained: Trained, progress: Progress, processes: Processes
) -> HeldOut:
    """The finished model on the same rows as before."""

    def tick(done: int) -> None:
        progress(done, len(trained.rows), "measuring the finished model")

    return measure(objective, read.held_out, trained.rows, processes, tick)


def _why_stayed(trained: Trained, settings: TrainingSettings) -> str:
    if not trained.position.best_tokens:
        return "training found nothing better"
    return f"not moved by train={settings.train}"


def _amounts(trained: Trained) -> tuple[Metric, ...]:
    place = trained.position
    updates = [point for point in trained.curve.points if point["kind"] == "update"]
    pace = updates[-1]["tokens_per_s"] if updates else 0.0
    return (
        Metric("training_tokens", place.tokens, "tokens"),
        Metric("training_updates", place.update, "updates"),
        Metric("training_tokens_per_s", pace, "tokens/s", "higher"),
    )
