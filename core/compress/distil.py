"""Distil: train this model until it says what its teacher says."""

from __future__ import annotations

from pathlib import Path

from core.compress._training import trained_result, training_cost
from core.distill.material import material, sides
from core.distill.precision import computing_in
from core.distill.settings import DistilSettings
from core.distill.students import refuse_unfit
from core.distill.tasks import aim, prepare_student, taught_as
from core.lazy import torch
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.registry import method
from core.types import Cost, Documents, Progress, Result, part_of


def _cost(anatomy: Anatomy, n_tokens: int, settings: DistilSettings) -> Cost:
    return training_cost(anatomy, n_tokens, settings, teacher=True)


@method(
    "compress",
    title="Distil",
    needs=["text"],
    paper="https://arxiv.org/abs/1503.02531",
    cost=_cost,
    left=lambda anatomy, settings: {},  # all parameters stay
)
def run(
    loaded: LoadedModel,
    reference: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: DistilSettings,
) -> Result:
    """Train this model until it says of every next token, or of every text's class, what its teacher says.

    What a cut or a coarse grid took comes back, as far as the parameters that are left allow. An encoder learns its
    teacher's cosines.

    Minimised is kd_weight · T² · divergence(teacher, student) + task_weight · cross entropy + losses on what goes on
    inside, by AdamW. Put it behind the steps that make the student (drop_layers, prune_width, own_student, gptq, densify),
    in one recipe: the teacher is then the model they began with. With kd_weight 0 and task_weight 1 it is the control,
    a student of the same size that learns without a teacher. The weights that were best on held-out rows are kept, those
    it began with included. It goes on where it was stopped.
    """
    taught_as(loaded, reference, settings)
    refuse_unfit(loaded, reference)
    progress(0.0, 1.0, "reading the rows")
    with loaded.lock, reference.lock, torch.inference_mode(False):
        both = sides(settings)
        classes = prepare_student(loaded, both.train, settings)
        read = material(both, loaded, settings, classes=classes)
        read.refuse_unread(reference)
        with computing_in(reference, settings.teacher_precision):
            return trained_result(
                "distil", loaded, lambda told: aim(loaded, reference, both, read, settings, told), read,
                part_of(progress, 0.02, 1.0), scratch, settings,
                inputs={"teacher": reference.fingerprint}, notes=both.notes, teaching=0.3,
            )  # fmt: skip
