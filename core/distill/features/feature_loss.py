"""What every loss on a model's inside looks like, and what they share.

Each reads tensors of both models in one forward pass (``reading.py``) and gives a sum over the tokens that count. Each
is 0, with gradient 0, where both models read the same. The teacher's tensors are constants.

Legend: ``B`` rows, ``P`` positions, ``N`` tokens that count, ``D`` width, ``S`` student's and ``T`` teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from core.distill.features.reading import Read, ReadAttention, Reads
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch

SMALLEST = 1e-12
"""Squared length below which a teacher's vector counts as this long, so that nothing is divided by 0."""


class FeatureLoss(Protocol):
    """One loss on what goes on inside."""

    @property
    def name(self) -> str:
        """What it is called in curves, e.g. ``hidden``."""

    @property
    def student_reads(self) -> tuple[Read | ReadAttention, ...]:
        """What it needs of the student's forward pass."""

    @property
    def teacher_reads(self) -> tuple[Read | ReadAttention, ...]:
        """What it needs of the teacher's."""

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What is learned with the student and thrown away afterwards, by name."""

    def loss(self, student: Reads, teacher: Reads, batch: Batch, counted_BP: Tensor) -> Tensor:
        """Sum over the tokens where ``counted_BP`` is true; differentiable in the student and ``parameters``."""


def tokens(states: Tensor, counted_BP: Tensor) -> Tensor:
    """The vectors of the tokens that count, [N, D] float32, from [B, P, D] or [B · P, D]."""
    return states.reshape(-1, states.shape[-1])[counted_BP.flatten()].float()


def projected(states_NS: Tensor, projection_TS: Any | None) -> Tensor:
    """The student's vectors in the teacher's width; as they are where widths are equal."""
    return states_NS if projection_TS is None else states_NS @ projection_TS.T


def relative_error(ours_ND: Tensor, theirs_ND: Tensor) -> Tensor:
    """‖a − b‖² / ‖b‖² per row, [N]."""
    return (ours_ND - theirs_ND).square().sum(-1) / theirs_ND.square().sum(-1).clamp_min(SMALLEST)


def kl(teacher_log_p: Tensor, student_log_p: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats over the last axis."""
    return torch.nn.functional.kl_div(student_log_p, teacher_log_p, log_target=True, reduction="none").sum(-1)
