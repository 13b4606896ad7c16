"""Head, softmax, loss and their gradient in one go, a block of positions at a time.

The straightforward way holds several float32 arrays of positions × vocabulary, and takes a softmax in the forward pass
and another in the backward pass. Here the gradient is computed where the softmax is, in the forward pass: only the
gradients of the hidden states and of the unembedding leave a block, and the backward pass multiplies them by a number.
What a slice of positions adds, and its gradient, is ``logit_gradient.py``.

Legend: N positions, D d_model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from core.distill.head import Head
from core.distill.losses.logit_gradient import Terms, of_slice
from core.distill.teacher_rows import TeacherRows
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES = 64 << 20
"""Logits of a block, in the model's dtype: large enough that the products run at full speed."""
SLICE_BYTES = 4 << 20
"""Float32 logits of a slice: they stay in the processor's cache while they are exponentiated, summed and scaled."""


@dataclass(frozen=True, eq=False)
class HeadLoss:
    """Sums over positions, in nats."""

    loss: Tensor
    """Weighted; differentiable in the hidden states and in the head's weight and bias."""
    kd: Tensor
    """T² · divergence, unweighted; 0 without a teacher."""
    task: Tensor
    """Cross entropy, unweighted; NaN where it was not needed and would have cost a softmax of its own."""


def fused_head_loss(
    hidden_ND: Tensor, head: Head, targets_N: Tensor, teacher: TeacherRows | None, terms: Terms
) -> HeadLoss:
    """The loss of next tokens from final hidden states; ``head`` must be plain (one matrix product)."""
    assert head.is_plain, "a head with adapters or hooks must be called"
    return HeadLoss(
        *_function().apply(hidden_ND, head.weight_VD, head.bias_V, head.anatomy, targets_N, teacher, terms)
    )


def blocks(n: int, vocabulary: int, element_size: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Equal parts of ``n`` positions whose logits take at most ``nbytes``, as (start, stop)."""
    parts = max(1, math.ceil(n * vocabulary * element_size / nbytes))
    size = max(1, math.ceil(n / parts))
    for start in range(0, n, size):
        yield start, min(start + size, n)


@cache
def _function() -> Any:
    """The autograd function; made at its first use, since its base class lives in torch."""

    class FusedHeadLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden_ND: Any, weight_VD: Any, bias_V: Any, *rest: Any) -> Any:
            work = _Work(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[:3])
            for start, stop in blocks(len(hidden_ND), len(weight_VD), hidden_ND.element_size(), BLOCK_BYTES):
                work.add(start, stop, *rest)
            ctx.gradients = (work.to_hidden_ND, work.to_weight_VD, work.to_bias_V)
            sums = work.sums.unbind()
            ctx.mark_non_differentiable(*sums[1:])
            return sums

        @staticmethod
        def backward(ctx: Any, to_loss: Any, *_: Any) -> Any:
            gradients = ctx.gradients
            if float(to_loss) != 1.0:
                gradients = tuple(None if g is None else g.mul_(to_loss) for g in gradients)
            ctx.gradients = (
                None  # given away, or scaled in place: there is nothing right to return a second time
            )
            return (*gradients, None, None, None, None)

    return FusedHeadLoss


class _Work:
    """Sums and gradients over the blocks so far."""

    def __init__(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wanted: tuple[bool, ...]
    ) -> None:
        self.hidden_ND, self.weight_VD, self.bias_V = hidden_ND, weight_VD, bias_V
        self.sums = torch.zeros(3, dtype=torch.float32, device=hidden_ND.device)
        """Loss, KD, task."""
        self.learns, self.learns_weight = any(wanted), wanted[1]
        self.to_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        self.to_weight_VD: Tensor | None = None
        self.to_bias_V = torch.zeros_like(bias_V) if bias_V is not None and wanted[2] else None

    def add(
        self,
        start: int,
        stop: int,
        anatomy: Any,
        targets_N: Tensor,
        teacher: TeacherRows | None,
        terms: Terms,
    ) -> None:
        """Positions ``start`` to ``stop``; the memory of their logits becomes that of the gradient."""
        hidden_ND = self.hidden_ND[start:stop]
        logits_NV = torch.nn.functional.linear(hidden_ND, self.weight_VD, self.bias_V)
        for first, last in blocks(len(hidden_ND), logits_NV.shape[1], 4, SLICE_BYTES):
            here = slice(start + first, start + last)
            rows = None if teacher is None else teacher.part(here.start, here.stop)
            sums, gradient_RV = of_slice(logits_NV[first:last], targets_N[here], rows, terms, anatomy)
            self.sums += sums
            if self.learns:
                logits_NV[first:last] = gradient_RV
        if self.to_hidden_ND is not None:
            torch.mm(logits_NV, self.weight_VD, out=self.to_hidden_ND[start:stop])
        if self.learns_weight and self.to_weight_VD is None:
            self.to_weight_VD = logits_NV.T @ hidden_ND
        elif self.to_weight_VD is not None:
            self.to_weight_VD.addmm_(logits_NV.T, hidden_ND)
        if self.to_bias_V is not None:
            self.to_bias_V += logits_NV.sum(0)
