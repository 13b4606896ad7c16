"""Fine-tune: train this model on data alone."""

from __future__ import annotations

from pathlib import Path

from core.compress._training import trained_result, training_cost
from core.distill.material import material, sides
from core.distill.settings import FineTuneSettings
from core.distill.tasks import plain_aim, prepare_student
from core.lazy import torch
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.registry import method
from core.types import Cost, Documents, Progress, Result, part_of


def _cost(anatomy: Anatomy, n_tokens: int, settings: FineTuneSettings) -> Cost:
    return training_cost(anatomy, n_tokens, settings, teacher=False)


@method(
    "compress",
    title="Fine-tune",
    needs=["text"],
    cost=_cost,
    left=lambda anatomy, settings: {},  # all parameters stay
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: FineTuneSettings,
) -> Result:
    """Train this model on your own rows: text to go on with, answers to give, texts to classify, pairs to compare.

    Minimised by AdamW is the cross entropy of the next token (of answers only, where rows are conversations), or of the
    label: the model gets a new head of these classes where it has none, and is then a base of its own. Of scored pairs,
    the squared distance of an encoder's cosine to the score. The weights
    that were best on held-out rows are kept, those it began with included. It goes on where it was stopped.
    """
    progress(0.0, 1.0, "reading the rows")
    with loaded.lock, torch.inference_mode(False):
        both = sides(settings)
        classes = prepare_student(loaded, both.train, settings)
        read = material(both, loaded, settings, classes=classes)
        return trained_result(
            "fine_tune", loaded, lambda _: (plain_aim(loaded, both), ()), read, part_of(progress, 0.02, 1.0), scratch,
            settings, inputs={}, notes=both.notes,
        )  # fmt: skip
