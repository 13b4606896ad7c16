"""The aim of a sentence encoder: texts as close to each other as its teacher finds them, or as people did.

Only cosines are compared, so student and teacher may have vectors of different widths. Over the batch's 2n texts the
loss of a pair is the mean squared difference of its two texts' rows in both models' matrices of cosines (Tung & Mori,
arXiv 1907.09682, with plain cosines); the task's is (cos − score)².

Legend: n scored pairs, M = 2n texts (first ones, then second ones), P positions, D d_model.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from core.distill.objective import Parts
from core.distill.remembered import Remembered
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch
    from core.distill.features.feature_match import FeatureMatch


def sentence_vectors(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Unit vectors [M, D] (float32) of the batch's texts, pooled as the checkpoint says; differentiable."""
    inputs = batch.inputs("encoder", dtype=loaded.model.dtype)
    tokens_MPD = loaded.model.base_model(**inputs).last_hidden_state.float()
    if loaded.pooling == "cls":
        pooled_MD = tokens_MPD[:, 0]
    else:
        mask_MP1 = (batch.segments_BP > 0).unsqueeze(-1).float()
        pooled_MD = (tokens_MPD * mask_MP1).sum(1) / mask_MP1.sum(1)
    unit_MD: Tensor = torch.nn.functional.normalize(pooled_MD, dim=-1)
    return unit_MD


class SimilarityObjective:
    """kd_weight · Σ squared differences of cosines to the teacher's + task_weight · Σ (cos − score)² + ``features``.

    ``teacher`` is None for plain training. Scores are cosines people would give: ``lowest`` and ``highest`` of the
    data are 0 and 1. Raises ``CannotCompress`` for a model that is not an encoder.
    """

    def __init__(
        self,
        student: LoadedModel,
        teacher: LoadedModel | None,
        *,
        kd_weight: float = 1.0,
        task_weight: float = 0.0,
        scores: tuple[float, float] = (0.0, 1.0),
        features: FeatureMatch | None = None,
    ) -> None:
        for loaded in (student, *([teacher] if teacher is not None else [])):
            if loaded.family != "encoder":
                raise CannotCompress(
                    f"{loaded.ref} is a {loaded.family}, sentence vectors need an encoder; open one, e.g. demo:minilm"
                )
        self.student, self.teacher, self.features = student, teacher, features
        self.kd_weight, self.task_weight, self.scores = kd_weight, task_weight, scores
        self._remembered = None if teacher is None else Remembered(lambda row: sentence_vectors(teacher, row))
        self.chosen_by = "kd" if teacher is not None and kd_weight and not task_weight else "task"

    def __call__(self, batch: Batch) -> Parts:
        """See ``Objective``."""
        batch = batch.to(self.student.model.device)
        with nullcontext() if self.features is None else self.features.captured():
            ours_MD = sentence_vectors(self.student, batch)
            if self.features is not None:
                assert self.teacher is not None, "features are a teacher's"
                with torch.no_grad():
                    sentence_vectors(self.teacher, batch)
        found = self._sums(batch, ours_MD)
        weights = {"kd": self.kd_weight, "task": self.task_weight}
        loss = torch.stack([weights[name] * value for name, value in found.items()]).sum()
        parts = {name: float(value.detach()) for name, value in found.items()}
        if self.features is not None:
            matched = self.features.loss(batch)
            loss, parts = loss + matched.loss, {**parts, **matched.parts}
        return Parts(loss, len(ours_MD) // 2, parts)

    def held_out(self, batch: Batch) -> dict[str, float]:
        """Sums over pairs of ``task`` and, with a teacher, ``kd``, both as in the loss; ranks are an evaluation's."""
        batch = batch.to(self.student.model.device)
        return {
            name: float(v) for name, v in self._sums(batch, sentence_vectors(self.student, batch)).items()
        }

    def _sums(self, batch: Batch, ours_MD: Tensor) -> dict[str, Tensor]:
        assert batch.labels_B is not None, "similarity is learned from scored pairs"
        lowest, highest = self.scores
        first_nD, second_nD = ours_MD.chunk(2)
        wanted_n = (batch.labels_B.float() - lowest) / (highest - lowest)
        sums = {"task": ((first_nD * second_nD).sum(-1) - wanted_n).square().sum()}
        if self._remembered is not None and self.kd_weight:
            theirs_MD = self._remembered(batch)
            difference_MM = ours_MD @ ours_MD.T - theirs_MD @ theirs_MD.T
            sums["kd"] = difference_MM.square().mean(-1).sum()
        return sums

    def learned(self) -> list[tuple[str, Any]]:
        """See ``Objective``."""
        return [] if self.features is None else self.features.named_parameters()
