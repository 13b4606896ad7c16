"""The aim of a decoder: to say of the next token what its teacher says, what came, or both.

Legend: N targets, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from core.distill.head import head_of
from core.distill.live_teacher import LiveTeacher, Teacher, final_hidden, targets_of
from core.distill.losses import cross_entropy, forward_kl
from core.distill.losses.fused_head import SLICE_BYTES, HeadLoss, blocks, fused_head_loss
from core.distill.losses.logit_gradient import Terms
from core.distill.objective import Parts
from core.distill.on_policy import OnPolicy
from core.distill.teacher_rows import Dense, TeacherRows, TopK, outcomes
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch
    from core.distill.features.feature_match import FeatureMatch


class LanguageObjective:
    """kd_weight · T² · divergence + task_weight · cross entropy + the weighted losses of ``features``.

    ``teacher`` is None for plain training. ``held_out_teacher`` answers for held-out rows, at temperature 1: a cache
    knows the rows of its own data only. Features need a ``LiveTeacher``, which then runs once for both; what the student
    writes itself is answered by ``on_policy``'s.
    """

    def __init__(
        self,
        student: LoadedModel,
        teacher: Teacher | None,
        terms: Terms,
        *,
        held_out_teacher: Teacher | None = None,
        features: FeatureMatch | None = None,
        on_policy: OnPolicy | None = None,
        vocabulary: int | None = None,
    ) -> None:
        assert features is None or isinstance(teacher, LiveTeacher), "cached rows have no inside"
        self.on_policy = on_policy
        self.student, self.teacher, self.terms, self.features = student, teacher, terms, features
        self.held_out_teacher = held_out_teacher
        self.head = head_of(student, vocabulary=vocabulary)
        self.chosen_by = "kl" if held_out_teacher is not None and terms.kd_weight else "task"

    def __call__(self, batch: Batch) -> Parts:
        """See ``Objective``."""
        batch = batch.to(self.student.model.device)
        teacher = self.teacher
        if self.on_policy is not None and self.on_policy.drawn():
            batch, teacher = self.on_policy.continued(batch), self.on_policy.teacher
        with nullcontext() if self.features is None else self.features.captured():
            hidden_ND = final_hidden(self.student, batch)
            rows = self._taught(batch, teacher)
        found = self._head_loss(hidden_ND, targets_of(batch), rows)
        loss, parts = found.loss, {}
        if rows is not None and self.terms.kd_weight:
            parts["kd"] = float(found.kd)
        if rows is None or self.terms.knows_task:
            parts["task"] = float(found.task)
        if self.features is not None:
            matched = self.features.loss(batch)
            loss = loss + matched.loss
            parts |= matched.parts
        return Parts(loss, len(hidden_ND), parts)

    def _taught(self, batch: Batch, teacher: Teacher | None) -> TeacherRows | None:
        """What the teacher says; with features it runs even where nothing else is asked of it."""
        if teacher is None or not (self.terms.kd_weight or self.features):
            return None
        rows = teacher.rows(batch)
        return rows if self.terms.kd_weight else None

    def _head_loss(self, hidden_ND: Tensor, targets_N: Tensor, rows: TeacherRows | None) -> HeadLoss:
        """In one go where the head is one product; where it has an adapter or a hook, through the head itself."""
        if self.head.is_plain:
            return fused_head_loss(hidden_ND, self.head, targets_N, rows, self.terms)
        terms, logits_NV = self.terms, self.head.logits(hidden_ND).float()
        kd = logits_NV.new_zeros(())
        if rows is not None:
            divergence_N = terms.divergence(*outcomes(logits_NV, rows, temperature=terms.temperature))
            kd = terms.temperature**2 * divergence_N.sum()
        task = cross_entropy.loss(logits_NV, targets_N).sum()
        return HeadLoss(terms.kd_weight * kd + terms.task_weight * task, kd.detach(), task.detach())

    def held_out(self, batch: Batch) -> dict[str, float]:
        """Sums of ``task`` (cross entropy) and ``accuracy`` (next tokens that were the likeliest); with a teacher also
        ``kl`` (teacher ‖ student, nats, temperature 1) and ``top1_agreement``."""
        batch = batch.to(self.student.model.device)
        hidden_ND, targets_N = final_hidden(self.student, batch), targets_of(batch)
        taught = self.held_out_teacher.rows(batch) if self.held_out_teacher is not None else None
        sums: dict[str, float] = {}
        for start, stop in blocks(len(hidden_ND), self.head.vocabulary, 4, 4 * SLICE_BYTES):
            rows = None if taught is None else taught.part(start, stop)
            logits_RV = self.head.logits(hidden_ND[start:stop])
            for name, value_R in _measures(logits_RV, targets_N[start:stop], rows):
                sums[name] = sums.get(name, 0.0) + float(value_R.double().sum())
        return sums

    def learned(self) -> list[tuple[str, Any]]:
        """See ``Objective``."""
        return [] if self.features is None else self.features.named_parameters()


def _measures(
    logits_RV: Tensor, targets_R: Tensor, rows: Dense | TopK | None
) -> Iterator[tuple[str, Tensor]]:
    likeliest_R = logits_RV.argmax(-1)
    yield "task", cross_entropy.loss(logits_RV, targets_R)
    yield "accuracy", likeliest_R == targets_R
    if rows is not None:
        yield "kl", forward_kl.loss(logits_RV, rows)
        yield "top1_agreement", likeliest_R == rows.likeliest
