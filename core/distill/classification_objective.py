"""The aim of a text classifier: to say of a text's class what its teacher says, what the label is, or both.

Legend: B texts, C classes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from core.distill.losses import cross_entropy, forward_kl
from core.distill.losses.logit_gradient import Terms
from core.distill.objective import Parts
from core.distill.remembered import Remembered
from core.distill.teacher_rows import Dense, outcomes
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch
    from core.distill.features.feature_match import FeatureMatch


def class_logits(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Class logits [B, C] of a text classifier; ``batch`` on its device."""
    inputs = batch.inputs("decoder" if loaded.anatomy.causal else "encoder", dtype=loaded.model.dtype)
    logits_BC: Tensor = loaded.model(**inputs).logits
    return logits_BC


class ClassificationObjective:
    """kd_weight · T² · divergence of class distributions + task_weight · cross entropy of labels + ``features``.

    ``teacher`` is None for plain training. Without features it reads each text once and is remembered. Raises
    ``CannotCompress`` where the two do not have the same classes in the same order.
    """

    def __init__(
        self,
        student: LoadedModel,
        teacher: LoadedModel | None,
        terms: Terms,
        *,
        features: FeatureMatch | None = None,
    ) -> None:
        if teacher is not None:
            refuse_other_classes(student, teacher)
        self.student, self.teacher, self.terms, self.features = student, teacher, terms, features
        self._remembered = None if teacher is None else Remembered(lambda row: class_logits(teacher, row))
        self.chosen_by = "kl" if teacher is not None and terms.kd_weight and not terms.task_weight else "task"

    def __call__(self, batch: Batch) -> Parts:
        """See ``Objective``."""
        batch = batch.to(self.student.model.device)
        assert batch.labels_B is not None, "classes are learned from labelled rows"
        taught_BC = None
        with nullcontext() if self.features is None else self.features.captured():
            logits_BC = class_logits(self.student, batch).float()
            if self.features is not None:
                assert self.teacher is not None, "features are a teacher's"
                with torch.no_grad():
                    taught_BC = class_logits(self.teacher, batch)
        if self._remembered is not None and taught_BC is None and self.terms.kd_weight:
            taught_BC = self._remembered(batch)
        terms, parts = self.terms, {}
        task = cross_entropy.loss(logits_BC, batch.labels_B).sum()
        loss, parts["task"] = terms.task_weight * task, float(task.detach())
        if taught_BC is not None and terms.kd_weight:
            p, q = outcomes(logits_BC, Dense(taught_BC), temperature=terms.temperature)
            kd = terms.temperature**2 * terms.divergence(p, q).sum()
            loss, parts["kd"] = loss + terms.kd_weight * kd, float(kd.detach())
        if self.features is not None:
            matched = self.features.loss(batch)
            loss, parts = loss + matched.loss, {**parts, **matched.parts}
        return Parts(loss, len(logits_BC), parts)

    def held_out(self, batch: Batch) -> dict[str, float]:
        """Sums of ``task`` (cross entropy) and ``accuracy``; with a teacher also ``kl`` at temperature 1 and
        ``top1_agreement``."""
        batch = batch.to(self.student.model.device)
        assert batch.labels_B is not None, "classes are measured on labelled rows"
        logits_BC = class_logits(self.student, batch).float()
        likeliest_B = logits_BC.argmax(-1)
        found: dict[str, Tensor] = {
            "task": cross_entropy.loss(logits_BC, batch.labels_B),
            "accuracy": likeliest_B == batch.labels_B,
        }
        if self._remembered is not None:
            taught_BC = self._remembered(batch)
            found["kl"] = forward_kl.loss(logits_BC, Dense(taught_BC))
            found["top1_agreement"] = likeliest_B == taught_BC.argmax(-1)
        return {name: float(value_B.double().sum()) for name, value_B in found.items()}

    def learned(self) -> list[tuple[str, Any]]:
        """See ``Objective``."""
        return [] if self.features is None else self.features.named_parameters()


def refuse_other_classes(student: LoadedModel, teacher: LoadedModel) -> None:
    """Raise ``CannotCompress`` where class 3 of one is not class 3 of the other."""
    ours, theirs = (dict(loaded.model.config.id2label) for loaded in (student, teacher))
    if ours != theirs:
        raise CannotCompress(
            f"{student.ref} tells {len(ours)} classes apart ({', '.join(map(str, list(ours.values())[:4]))} …) and its "
            f"teacher {teacher.ref} {len(theirs)} ({', '.join(map(str, list(theirs.values())[:4]))} …); teach a student "
            "that was made from this teacher, or fine-tune a teacher on the same labels"
        )
