"""How much each unit of a block writes, and what the units that stay must write to make good those that go.

A unit is a run of inputs of the projection that writes to the residual stream: a neuron is one, a head head_dim of them.
Plain functions of the projection's weight and of XᵀX of its inputs.

Legend: ``O`` outputs, ``I`` inputs, ``U`` units, ``w`` inputs of a unit, ``K`` inputs that stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
"""Ridge of the least squares, as a share of the mean of XᵀX's diagonal."""


def written(weight_OI: Tensor, gram_II: Tensor, width: int) -> Tensor:
    """Σ_t ‖W_u x_u‖² of every unit u, [U]: how much it writes to the stream over all tokens, squared."""
    blocks_UOw = weight_OI.view(len(weight_OI), -1, width).permute(1, 0, 2)
    n_units = len(blocks_UOw)
    grams_Uww = torch.stack(
        [gram_II[u * width : (u + 1) * width, u * width : (u + 1) * width] for u in range(n_units)]
    )
    return (blocks_UOw @ grams_Uww * blocks_UOw).sum((1, 2))


def active(gram_II: Tensor, width: int) -> Tensor:
    """Σ_t ‖x_u‖² of every unit, [U]: how active it is, whatever is made of it (Minitron, 2407.14679)."""
    return gram_II.diagonal().view(-1, width).sum(1)


def reconstructed(weight_OI: Tensor, gram_II: Tensor, kept_K: Tensor, *, damping: float) -> Tensor:
    """W' with zeros outside ``kept_K`` that minimises ‖X W'ᵀ − X Wᵀ‖² + λ ‖W'_K − W_K‖², λ = damping · mean diagonal."""
    gram_KK = gram_II[kept_K][:, kept_K]
    ridge = damping * gram_KK.diagonal().mean() * torch.eye(len(kept_K), device=gram_II.device)
    wanted_OK = weight_OI @ gram_II[:, kept_K] + weight_OI[:, kept_K] @ ridge
    solved_OK = torch.linalg.solve(gram_KK + ridge, wanted_OK, left=False)
    found_OI = torch.zeros_like(weight_OI)
    found_OI[:, kept_K] = solved_OK
    return found_OI


def without(weight_OI: Tensor, kept_K: Tensor) -> Tensor:
    """W with zeros outside ``kept_K``, the rest as it was."""
    found_OI = torch.zeros_like(weight_OI)
    found_OI[:, kept_K] = weight_OI[:, kept_K]
    return found_OI
