"""Training a TopK sparse autoencoder on rows of activations (Gao et al. 2024), wherever they come from.

Legend: N rows, B rows of one batch, D width, F features, K active features, A dead features given a second chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch
from core.models.gradients import differentiable
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

AUXILIARY_WEIGHT = 1 / 32
"""Of the loss of the dead features' reconstruction of the error (Gao 2024, A.2)."""


@dataclass(frozen=True)
class Recipe:
    """How to train; see ``SparseAutoencoderSettings`` for what each means."""

    n_features: int
    k: int
    epochs: float
    batch: int
    learning_rate: float
    dead_after: int
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """Weights, and the loss on the way: rows (step, rows seen, FVU of the batch, dead share)."""

    encoder_DF: Tensor
    encoder_bias_F: Tensor
    decoder_FD: Tensor
    bias_D: Tensor
    curve: list[tuple[int, int, float, float]]


def fit(x_ND: Tensor, recipe: Recipe, progress: Progress) -> Fitted:
    """Minimize ‖x − x̂‖² + AuxK / 32; both as shares of the rows' variance. ``progress`` may raise ``Cancelled``."""
    generator = torch.Generator().manual_seed(recipe.seed)
    bias_D = x_ND.mean(0).clone()
    decoder_FD = torch.randn(recipe.n_features, x_ND.shape[1], generator=generator).to(x_ND)
    decoder_FD = torch.nn.functional.normalize(decoder_FD, dim=-1)
    encoder_DF = decoder_FD.T.clone()
    encoder_bias_F = torch.zeros_like(decoder_FD[:, 0])
    parameters = [p.requires_grad_() for p in (encoder_DF, encoder_bias_F, decoder_FD, bias_D)]
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, eps=6.25e-10)
    variance = float((x_ND - x_ND.mean(0)).square().sum(-1).mean())
    idle_F = torch.zeros(recipe.n_features, device=x_ND.device)
    steps = max(1, round(recipe.epochs * len(x_ND) / recipe.batch))
    order = torch.randperm(len(x_ND), generator=generator)
    curve = []
    for step in range(1, steps + 1):
        at = (step - 1) * recipe.batch % len(order)
        x_BD = x_ND[order[at : at + recipe.batch].to(x_ND.device)]
        with differentiable():
            pre_BF = (x_BD - bias_D) @ encoder_DF + encoder_bias_F
            top_BK, ids_BK = pre_BF.topk(recipe.k)
            values_BK = torch.relu(top_BK)
            error_BD = x_BD - _decode(values_BK, ids_BK, decoder_FD) - bias_D
            unexplained = error_BD.square().sum(-1).mean() / variance
            auxiliary = _auxiliary(pre_BF, error_BD.detach(), idle_F >= recipe.dead_after, decoder_FD)
            (unexplained + AUXILIARY_WEIGHT * auxiliary).backward()  # type: ignore[no-untyped-call]
        idle_F += len(x_BD)
        idle_F[ids_BK[values_BK > 0]] = 0
        _drop_radial_part(decoder_FD)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        decoder_FD.data = torch.nn.functional.normalize(decoder_FD.data, dim=-1)
        dead = float((idle_F >= recipe.dead_after).float().mean())
        curve.append((step, step * recipe.batch, float(unexplained.detach()), dead))
        progress(step, steps, f"step {step} of {steps}: FVU {curve[-1][2]:.3f}, {dead:.0%} of features dead")
    return Fitted(encoder_DF.detach(), encoder_bias_F.detach(), decoder_FD.detach(), bias_D.detach(), curve)


def _decode(values_BK: Tensor, ids_BK: Tensor, decoder_FD: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(ids_BK, decoder_FD, per_sample_weights=values_BK, mode="sum")


def _auxiliary(pre_BF: Tensor, error_BD: Tensor, dead_F: Tensor, decoder_FD: Tensor) -> Tensor:
    """How badly the strongest dead features explain what the living ones left, as a share of it; 0 without dead ones.

    Taken before the ReLU, which would pass no gradient to a feature that is dead because it is never positive.
    """
    n_dead = int(dead_F.sum())
    if not n_dead:
        return torch.zeros((), device=pre_BF.device)
    k = min(n_dead, error_BD.shape[1] // 2)
    values_BA, ids_BA = pre_BF.masked_fill(~dead_F, -math.inf).topk(k)
    explained_BD = _decode(values_BA, ids_BA, decoder_FD)
    return (error_BD - explained_BD).square().sum() / error_BD.square().sum().clamp(min=1e-12)


def _drop_radial_part(decoder_FD: Tensor) -> None:
    """A decoder row keeps unit norm, so the gradient along it would only distort Adam's moments."""
    gradient_FD = decoder_FD.grad
    assert gradient_FD is not None
    along_F1 = torch.linalg.vecdot(gradient_FD, decoder_FD.detach())[:, None]
    gradient_FD -= along_F1 * decoder_FD.detach()


def _schedule(step: int, steps: int) -> float:
    """A short warm-up, then flat, then linearly to 0 over the last fifth."""
    return min(1.0, step / max(1, steps // 50), (steps - step + 1) / max(1, steps // 5))
