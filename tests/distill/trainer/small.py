"""A training that takes a second: a tiny decoder learns four sentences by heart, in rows of 16 tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.corpus.batches import tokenized
from core.corpus.rows import Row, Rows
from core.distill.settings import TrainingSettings
from core.distill.teaching import plain_language_aim
from core.distill.trainable.prepare import prepare
from core.distill.trainer import Job, Trained, train
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.types import ModelRef, Progress, silent
from tests.tiny import CORPUS, tiny_folder

SETTINGS: dict[str, Any] = {
    "window": 16, "batch_tokens": 32, "micro_batch": 1, "max_tokens": 300, "evaluate_every": 100,
    "held_out_tokens": 256, "learning_rate": 1e-3, "samples": 0, "checkpoint_minutes": 0, "patience": 0,
}  # fmt: skip
NOT_TIME = ("update", "tokens", "loss", "gradient_norm", "learning_rate", "values", "best")
"""What of a point does not depend on the machine's pace."""


def job_in(folder: Path, **changed: Any) -> Job:
    """A fresh model on the same data, always the same."""
    loaded = open_model(ModelRef(str(tiny_folder("llama", folder / "model"))))
    settings = TrainingSettings(**{**SETTINGS, **changed})
    sides = (
        Rows(name, "text", tuple(Row(text=text) for text in texts))
        for name, texts in (("train", CORPUS[:3]), ("held out", CORPUS[3:]))
    )
    training, held_out = (tokenized(rows, loaded.tokenizer, window=settings.window) for rows in sides)
    with torch.inference_mode(False):
        trainable = prepare(loaded, settings)
        return Job(loaded, plain_language_aim(loaded), training, held_out, trainable, settings)


def trained_in(
    folder: Path, *, scratch: Path | None = None, progress: Progress = silent, **changed: Any
) -> Any:
    """(job, what it came to)."""
    job = job_in(folder, **changed)
    return job, train(job, scratch=scratch, progress=progress)


def weights_hash(loaded: LoadedModel) -> str:
    """Of all parameters, bit for bit."""
    whole = hashlib.sha256()
    for parameter in loaded.model.parameters():
        whole.update(parameter.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


def timeless(trained: Trained) -> list[Mapping[str, Any]]:
    """The curve without what depends on the machine's pace."""
    return [{name: point[name] for name in NOT_TIME if name in point} for point in trained.curve.points]
