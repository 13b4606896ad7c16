"""Weights that are learned behind their rounding: the forward pass reads rounded ones, exact ones take the gradient.

On integer grids scales learn too (LSQ, https://arxiv.org/abs/1902.08153). With u = V / s + z of the exact weight V,

    W = s · (round(clamp(u)) - z),   ∂W/∂V = 1 where u is within the codes, else 0,
    s · ∂W/∂s = W - V within, W beyond,

round being passed as if it were not there; s = s₀ · exp(θ) as in ``scales_and_norms``. Zero points stay. Narrow floats
(float8, MX, NVFP4) get the scales that rounding V to nearest gives, again after every update: nothing is beyond, and the
gradient of V is that of W. What V follows from is ``ExactWeight``'s matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.distill.trainable.exact_weight import ExactWeight
from core.distill.trainable.following import Rule, add_gradient
from core.distill.trainable.on_grid import in_steps, nearest, reach, scaled, summed
from core.lazy import torch
from core.numerics.packed import PackedTensor
from core.numerics.quantize import quantize
from core.numerics.schemes import FloatScheme, IntegerScheme, TernaryScheme

if TYPE_CHECKING:
    from torch import Tensor


class OnGrid:
    """An exact weight behind an integer grid, and the grid's scales."""

    def __init__(self, packed: PackedTensor, exact: ExactWeight) -> None:
        assert packed.scale is not None
        self.start, self.shape, self.exact = packed, packed.scale.shape, exact
        change = torch.zeros(packed.scale.numel(), dtype=torch.float32, device=packed.scale.device)
        self.learned = {**exact.learned, "scale": torch.nn.Parameter(change)}

    def packed(self) -> PackedTensor:
        """The nearest codes of the exact weights under the scales as they are now."""
        return nearest(self.exact.value(), self._grid())

    def pull(self, weight: Tensor, gradient: Tensor) -> None:
        """See ``Rule``."""
        exact, grid = self.exact.value(), self._grid()
        steps, (low, high) = in_steps(exact, grid), reach(grid)
        within = (steps >= low) & (steps <= high)
        moved = gradient * (weight - exact.where(within, 0.0))
        add_gradient(self.learned["scale"], summed(moved, grid).flatten())
        self.exact.pull(gradient.where(within, 0.0))

    def _grid(self) -> PackedTensor:
        return scaled(self.start, self.learned["scale"].detach().exp().view(self.shape))


class NarrowFloat:
    """An exact weight behind a narrow float."""

    def __init__(self, packed: PackedTensor, exact: ExactWeight) -> None:
        self.start, self.exact, self.learned = packed, exact, exact.learned

    def packed(self) -> PackedTensor:
        """The exact weights rounded to nearest."""
        if self.start.scale is None:
            return nearest(self.exact.value(), self.start)
        found = quantize(self.exact.value(), self.start.scheme)
        assert isinstance(found, PackedTensor)
        return found

    def pull(self, weight: Tensor, gradient: Tensor) -> None:
        """See ``Rule``; a float without scales ends somewhere, which a gradient of 0 beyond keeps in mind."""
        if self.start.scale is None:
            limit = torch.finfo(self.start.codes.dtype).max
            gradient = gradient.where(self.exact.value().abs() <= limit, 0.0)
        self.exact.pull(gradient)


def behind_rounding(packed: PackedTensor, exact: ExactWeight) -> Rule:
    """The rule of a stored form whose weight follows from ``exact``."""
    on_grid = isinstance(packed.scheme, IntegerScheme | TernaryScheme)
    assert on_grid or packed.scale is not None or isinstance(packed.scheme, FloatScheme)
    return OnGrid(packed, exact) if on_grid else NarrowFloat(packed, exact)
