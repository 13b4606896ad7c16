"""Integer grids that fit a weight better than its extremes do: scales and zero points chosen by an error of the weights.

Round-to-nearest spans each group's minimum and maximum, so one outlier coarsens the grid of all others. Here the grid of
every group is free: a candidate replaces what is there only where the group's error, measured with the numbers as they
are stored (scales in their storage dtype, whole zero points), becomes smaller. So no group ever ends worse than
round-to-nearest. Knows weights and grids only; what the error is, the caller says.

Legend: ``R`` leading axes, ``C`` columns, ``G`` groups of a row, ``K`` values of a group (C = G · K).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.integer import code_range, quantize, stored_scale
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme

if TYPE_CHECKING:
    from torch import Tensor

ErrorOf = Callable[["Tensor"], "Tensor"]
"""Difference of a weight [R, G, K] → error of each group [R, G]."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of every group of a weight, in the numbers that are stored."""

    scheme: IntegerScheme
    scale_RG: Tensor
    """In its storage dtype."""
    zero_RG: Tensor | None
    """Whole numbers in float32, on the signed range of the codes; None where symmetric."""

    @classmethod
    def spanning(cls, groups_RGK: Tensor, like: Grid) -> Grid:
        """Round-to-nearest's grid of (clipped) values, its scales stored as ``like`` has them."""
        packed = quantize(groups_RGK.flatten(-2), like.scheme, scale_dtype=like.scale_RG.dtype)
        return cls.of(packed)

    @classmethod
    def of(cls, packed: PackedTensor) -> Grid:
        """The grid that a packed weight is on."""
        assert packed.scale is not None
        assert isinstance(packed.scheme, IntegerScheme)
        zero = None if packed.zero_point is None else packed.zero_point.float()
        return cls(packed.scheme, packed.scale, zero)

    def with_scale(self, scale_RG: Tensor, zero_RG: Tensor | None) -> Grid:
        """The same with other scales and zero points, rounded to what can be stored; what is no scale keeps the old one."""
        low, high = code_range(self.scheme.bits)
        usable = torch.isfinite(scale_RG) & (scale_RG > 0)
        scale_RG = torch.where(usable, scale_RG, self.scale_RG.float())
        if zero_RG is not None and self.zero_RG is not None:
            zero_RG = torch.where(usable, zero_RG.round().clamp(low, high), self.zero_RG)
        return Grid(self.scheme, stored_scale(scale_RG, self.scale_RG.dtype), zero_RG)

    def codes(self, groups_RGK: Tensor) -> Tensor:
        """The nearest code of every value, in float32: ``core.numerics.integer``'s rounding."""
        low, high = code_range(self.scheme.bits)
        scaled_RGK = groups_RGK / self.scale_RG.float().unsqueeze(-1)
        if self.zero_RG is not None:
            scaled_RGK += self.zero_RG.unsqueeze(-1)
        return scaled_RGK.clamp_(low, high).round_()

    def values(self, codes_RGK: Tensor) -> Tensor:
        """What codes stand for, in float32."""
        steps_RGK = codes_RGK if self.zero_RG is None else codes_RGK - self.zero_RG.unsqueeze(-1)
        return steps_RGK * self.scale_RG.float().unsqueeze(-1)

    def replaced(self, other: Grid, where_RG: Tensor) -> Grid:
        """``other``'s grid in the groups where it says so."""
        zero_RG = None
        if self.zero_RG is not None and other.zero_RG is not None:
            zero_RG = torch.where(where_RG, other.zero_RG, self.zero_RG)
        return Grid(self.scheme, torch.where(where_RG, other.scale_RG, self.scale_RG), zero_RG)

    def pack(self, groups_RGK: Tensor) -> PackedTensor:
        """A weight on this grid, every value on its nearest point."""
        codes_RC = self.codes(groups_RGK).to(torch.int8).flatten(-2)
        zero_RG = None if self.zero_RG is None else self.zero_RG.to(torch.int8)
        return PackedTensor(codes_RC, self.scale_RG, zero_RG, self.scheme)


def grouped(weight_RC: Tensor, scheme: IntegerScheme) -> Tensor:
    """A weight cut into its groups, in float32: [R, G, K]."""
    return torch.unflatten(weight_RC.float(), -1, (scheme.groups(weight_RC.shape[-1]), -1))


def improved(grid: Grid, error_RG: Tensor, candidate: Grid, candidate_RG: Tensor) -> tuple[Grid, Tensor]:
    """The better grid of each group, and its error."""
    better_RG = candidate_RG < error_RG
    return grid.replaced(candidate, better_RG), torch.where(better_RG, candidate_RG, error_RG)


def clipped_grid(groups_RGK: Tensor, grid: Grid, error_of: ErrorOf, *, ratios: list[float]) -> Grid:
    """The best of grids that span a share of each group's range, from ``grid``: its largest values are clipped."""
    error_RG = error_of(grid.values(grid.codes(groups_RGK)) - groups_RGK)
    lowest_RG1, highest_RG1 = groups_RGK.amin(-1, keepdim=True), groups_RGK.amax(-1, keepdim=True)
    for ratio in ratios:
        narrowed_RGK = groups_RGK.clamp(lowest_RG1 * ratio, highest_RG1 * ratio)
        candidate = Grid.spanning(narrowed_RGK, grid)
        candidate_RG = error_of(candidate.values(candidate.codes(groups_RGK)) - groups_RGK)
        grid, error_RG = improved(grid, error_RG, candidate, candidate_RG)
    return grid


def refitted_grid(
    groups_RGK: Tensor, grid: Grid, gram_GKK: Tensor, error_of: ErrorOf, *, rounds: int
) -> Grid:
    """Scales by least squares given the codes, weighted by the inputs: s = (w H c) / (c H c), c = code - zero."""
    error_RG = error_of(grid.values(grid.codes(groups_RGK)) - groups_RGK)
    for _ in range(rounds):
        steps_RGK = grid.codes(groups_RGK)
        if grid.zero_RG is not None:
            steps_RGK -= grid.zero_RG.unsqueeze(-1)
        weighted_RGK = torch.einsum("rgk,gkj->rgj", steps_RGK, gram_GKK)
        scale_RG = (weighted_RGK * groups_RGK).sum(-1) / (weighted_RGK * steps_RGK).sum(-1)
        candidate = grid.with_scale(scale_RG, grid.zero_RG)
        candidate_RG = error_of(candidate.values(candidate.codes(groups_RGK)) - groups_RGK)
        grid, error_RG = improved(grid, error_RG, candidate, candidate_RG)
    return grid


def half_quadratic(
    groups_RGK: Tensor, grid: Grid, *, p: float, beta: float, kappa: float, iterations: int, refit_scale: bool
) -> tuple[Grid, list[float]]:
    """HQQ's grid of a weight and its mean error Σ|W - Ŵ|^p per value after every iteration, the first before any.

    The difference d = W - Ŵ is split: e = sign(d) · max(|d| - |d|^(p-1) / β, 0) takes what is large (the outliers), and
    the grid is fitted to W - e by least squares, given the codes: the zero point alone, or also the scale
    (https://mobiusml.github.io/hqq_blog). The paper's zero point is a float; files hold whole ones, so it is rounded, and
    with ``refit_scale`` the scale is fitted again to the rounded one. d is counted in steps of the grid, so that β does not
    depend on how large weights are. β grows by ``kappa``; stops where nothing improves.
    """

    def error_of(grid: Grid) -> Tensor:
        difference_RGK = grid.values(grid.codes(groups_RGK)) - groups_RGK
        return difference_RGK.abs_().pow_(p).sum(-1)

    error_RG = error_of(grid)
    curve = [float(error_RG.sum()) / groups_RGK.numel()]
    for _ in range(iterations):
        codes_RGK = grid.codes(groups_RGK)
        difference_RGK = groups_RGK - grid.values(codes_RGK)
        step_RG1 = grid.scale_RG.float().unsqueeze(-1)
        target_RGK = groups_RGK - _shrunk(difference_RGK / step_RG1, p=p, beta=beta) * step_RG1
        candidate = _fitted(grid, codes_RGK, target_RGK, refit_scale=refit_scale)
        grid, error_RG = improved(grid, error_RG, candidate, error_of(candidate))
        beta *= kappa
        curve.append(float(error_RG.sum()) / groups_RGK.numel())
        if curve[-1] == curve[-2]:
            break
    return grid, curve


def _shrunk(difference: Tensor, *, p: float, beta: float) -> Tensor:
    """The generalised soft threshold; 0 stays 0."""
    size = difference.abs()
    kept = (size - size.pow(p - 1) / beta).clamp_(min=0)
    return difference.sign() * torch.where(size > 0, kept, size)


def _fitted(grid: Grid, codes_RGK: Tensor, target_RGK: Tensor, *, refit_scale: bool) -> Grid:
    """Least squares of a target on its codes: target = (code - zero) · scale."""
    scale_RG, zero_RG = grid.scale_RG.float(), grid.zero_RG
    if zero_RG is None:
        return grid.with_scale((codes_RGK * target_RGK).sum(-1) / codes_RGK.square().sum(-1), None)
    code_RG, mean_RG = codes_RGK.mean(-1), target_RGK.mean(-1)
    if not refit_scale:
        return grid.with_scale(scale_RG, code_RG - mean_RG / scale_RG)
    centred_RGK = codes_RGK - code_RG.unsqueeze(-1)
    slope_RG = (centred_RGK * target_RGK).sum(-1) / centred_RGK.square().sum(-1)
    rounded = grid.with_scale(slope_RG, code_RG - mean_RG / slope_RG)
    assert rounded.zero_RG is not None
    steps_RGK = codes_RGK - rounded.zero_RG.unsqueeze(-1)
    return grid.with_scale((steps_RGK * target_RGK).sum(-1) / steps_RGK.square().sum(-1), rounded.zero_RG)
