"""AWQ's search: a scale per input channel that makes rounding cost the outputs least, found without running the model.

Multiplying column j of W by s_j and dividing its input by s_j changes nothing but what rounding does: channels that carry
large activations get finer steps. The error of the outputs over all calibration tokens, ‖X (Ŵ - W)ᵀ‖², is
tr((Ŵ - W) H (Ŵ - W)ᵀ) with H = XᵀX, so every candidate is judged on every token for the price of one small product.

Legend: ``O`` outputs, ``I`` inputs, ``S`` scales, ``R`` rows as stored, ``G`` groups of a row, ``K`` values of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from core.lazy import torch
from core.quantize.grid_fit import Grid, clipped_grid, refitted_grid

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-4
"""Scales and weight sizes are kept above this, as in the reference implementation."""
SEARCH_ROWS = 192
"""Outputs of a matrix that ratios are compared on; the one that is chosen is held against none at all on every output."""


@dataclass(frozen=True, eq=False)
class Reader:
    """One matrix that reads the scaled activation, with what calibration says of that activation."""

    weight_OI: Tensor
    gram_II: Tensor | None
    """XᵀX over the tokens that reached it; None where none did."""
    round: Callable[[Tensor], Tensor]
    """W [O, I] → the values it would be stored as."""
    by_rows: bool = True
    """Whether every row is rounded on its own, so that some of them can stand for all."""

    def sample(self) -> Reader:
        """At most ``SEARCH_ROWS`` of its rows, evenly spread."""
        stride = max(1, len(self.weight_OI) // SEARCH_ROWS)
        return replace(self, weight_OI=self.weight_OI[::stride]) if self.by_rows else self

    def loss(self, scale_I: Tensor | None) -> float:
        """‖X (Ŵ - W)ᵀ‖² with Ŵ = Q(W · s) / s; None: without scales."""
        if self.gram_II is None:
            return 0.0
        rounded_OI = (
            self.round(self.weight_OI) if scale_I is None else self.round(self.weight_OI * scale_I) / scale_I
        )
        return output_loss(rounded_OI - self.weight_OI, self.gram_II)


@dataclass(frozen=True, eq=False)
class Found:
    """The scales of one search."""

    scale_S: Tensor | None
    """None where no candidate was better than none."""
    ratio: float
    """Of activation sizes in the scales, 0–1; 0 without scales."""
    loss_before: float
    """Round-to-nearest's."""
    loss: float


def output_loss(error_OI: Tensor, gram_II: Tensor) -> float:
    """‖X Eᵀ‖² = tr(E H Eᵀ); rounding never makes it negative, and what is no number stays so."""
    return float(((error_OI @ gram_II) * error_OI).sum(dtype=torch.float64).clamp(min=0))


def channel_scales(mean_abs_S: Tensor, weight_size_S: Tensor | None, ratio: float) -> Tensor:
    """s = x^r, or x^r / w^(1 - r) where weight sizes are given; the largest times the smallest is 1."""
    scale_S = mean_abs_S.clamp(min=SMALLEST).pow(ratio)
    if weight_size_S is not None:
        scale_S = scale_S / (weight_size_S.pow(1 - ratio) + SMALLEST)
    scale_S = scale_S.clamp(min=SMALLEST)
    return scale_S / (scale_S.amax() * scale_S.amin()).sqrt()


def weight_sizes(weights: Sequence[Tensor], group_size: int | None) -> Tensor:
    """Per input channel, the mean over all outputs of |W| / max |W| of its group: [I]."""
    sizes = []
    for weight_OI in weights:
        size = weight_OI.shape[1] if group_size is None or weight_OI.shape[1] % group_size else group_size
        groups_OGK = torch.unflatten(weight_OI.abs(), -1, (-1, size))
        sizes.append((groups_OGK / groups_OGK.amax(-1, keepdim=True).clamp(min=SMALLEST)).flatten(-2))
    return torch.cat(sizes).mean(0)


def search_scales(
    readers: Sequence[Reader],
    mean_abs_S: Tensor,
    *,
    steps: int,
    weight_size_S: Tensor | None,
    spread: Callable[[Tensor], Tensor],
) -> Found:
    """The ratio r of 0, 1 / steps … whose scales make the readers' outputs move least; none at all is a candidate too.

    ``spread`` maps scales to the readers' inputs, where several of them must share one.
    """

    def loss(scale_S: Tensor | None, of: Sequence[Reader]) -> float:
        return sum(reader.loss(None if scale_S is None else spread(scale_S)) for reader in of)

    some = [reader.sample() for reader in readers]
    candidates = {
        step / steps: channel_scales(mean_abs_S, weight_size_S, step / steps)
        for step in range(0 if weight_size_S is not None else 1, steps + 1)  # x⁰ = 1 is no scale at all
    }
    losses = {ratio: loss(scale_S, some) for ratio, scale_S in candidates.items()}
    ratio = min(losses, key=lambda ratio: losses[ratio])
    before = loss(None, readers)
    after = loss(candidates[ratio], readers) if losses[ratio] < loss(None, some) else before
    return (
        Found(candidates[ratio], ratio, before, after) if after < before else Found(None, 0.0, before, before)
    )


def fit_to_inputs(
    groups_RGK: Tensor, grid: Grid, gram_II: Tensor, *, transposed: bool, clip_steps: int, max_shrink: float,
    refits: int,
) -> tuple[Grid, float]:  # fmt: skip
    """A grid whose ranges are clipped, and scales refitted, where that moves the outputs less; and the outputs' loss.

    Each group is judged by its own inputs, eᵀ H_gg e, as if the other groups of its row were exact; where groups run
    along outputs (``transposed``), all values of one have the same input, and it is judged by the square of its error. If
    all of them together move the outputs more after all, the grid stays as it was.
    """
    n_groups, size = groups_RGK.shape[-2:]
    gram_GKK = torch.eye(size, device=groups_RGK.device).expand(n_groups, -1, -1)
    if not transposed:
        gram_GKK = diagonal_blocks(gram_II, n_groups)

    def error_of(error_RGK: Tensor) -> Tensor:
        return (torch.einsum("rgk,gkj->rgj", error_RGK, gram_GKK) * error_RGK).sum(-1)

    def loss_of(grid: Grid) -> float:
        error = (grid.values(grid.codes(groups_RGK)) - groups_RGK).flatten(-2)
        return output_loss(error.T if transposed else error, gram_II)

    ratios = [1 - max_shrink * step / clip_steps for step in range(1, clip_steps + 1)]
    fitted = clipped_grid(groups_RGK, grid, error_of, ratios=ratios)
    fitted = refitted_grid(groups_RGK, fitted, gram_GKK, error_of, rounds=refits)
    before, after = loss_of(grid), loss_of(fitted)
    return (fitted, after) if after < before else (grid, before)


def diagonal_blocks(gram_II: Tensor, groups: int) -> Tensor:
    """The blocks of H that belong to each group of inputs: [G, K, K]."""
    size = gram_II.shape[0] // groups
    return torch.stack([gram_II[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])
