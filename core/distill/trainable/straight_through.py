"""Weights that are learned behind their rounding: the forward pass reads rounded ones, exact ones take the gradient.

On integer grids scales learn too (LSQ, https://arxiv.org/abs/1902.08153). With u = V / s + z of the exact weight V,

    W = s · (round(clamp(u)) - z),   ∂W/∂V = 1 where u is within the codes, else 0,
    s · ∂W/∂s = W - V within, W beyond,

round being passed as if it were not there; s = s₀ · exp(θ) as in ``scales_and_norms``. Zero points stay. Narrow floats
(float8, MX, NVFP4) get the scales that rounding V to nearest gives, again after every update: nothing is beyond, and the
gradient of V is that of W. The exact weights are a float32 copy of all that is quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.distill.trainable.following import Following, Rule, add_gradient, forms_of, refuse_no_grid
from core.distill.trainable.full import small
from core.distill.trainable.on_grid import in_steps, nearest, reach, scaled, summed
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.numerics.packed import PackedTensor
from core.numerics.quantize import quantize
from core.numerics.schemes import FloatScheme, IntegerScheme, TernaryScheme

if TYPE_CHECKING:
    from torch import Tensor


class OnGrid:
    """Exact weights behind an integer grid, and its scales."""

    def __init__(self, packed: PackedTensor) -> None:
        assert packed.scale is not None
        self.start, self.shape = packed, packed.scale.shape
        change = torch.zeros(packed.scale.numel(), dtype=torch.float32, device=packed.scale.device)
        self.learned = {
            "exact": torch.nn.Parameter(packed.dequantize().float()),
            "scale": torch.nn.Parameter(change),
        }

    def packed(self) -> PackedTensor:
        """The nearest codes of the exact weights under the scales as they are now."""
        return nearest(self.learned["exact"].detach(), self._grid())

    def pull(self, weight: Tensor, gradient: Tensor) -> None:
        """See ``Rule``."""
        exact, grid = self.learned["exact"].detach(), self._grid()
        steps, (low, high) = in_steps(exact, grid), reach(grid)
        within = (steps >= low) & (steps <= high)
        moved = gradient * (weight - exact.where(within, 0.0))
        add_gradient(self.learned["scale"], summed(moved, grid).flatten())
        add_gradient(self.learned["exact"], gradient.where(within, 0.0))

    def _grid(self) -> PackedTensor:
        return scaled(self.start, self.learned["scale"].detach().exp().view(self.shape))


class NarrowFloat:
    """Exact weights behind a narrow float."""

    def __init__(self, packed: PackedTensor) -> None:
        self.start = packed
        self.learned = {"exact": torch.nn.Parameter(packed.dequantize().float())}

    def packed(self) -> PackedTensor:
        """The exact weights rounded to nearest."""
        exact = self.learned["exact"].detach()
        if self.start.scale is None:
            return nearest(exact, self.start)
        found = quantize(exact, self.start.scheme)
        assert isinstance(found, PackedTensor)
        return found

    def pull(self, weight: Tensor, gradient: Tensor) -> None:
        """See ``Rule``; a float without scales ends somewhere, which a gradient of 0 beyond keeps in mind."""
        if self.start.scale is None:
            limit = torch.finfo(self.start.codes.dtype).max
            gradient = gradient.where(self.learned["exact"].detach().abs() <= limit, 0.0)
        add_gradient(self.learned["exact"], gradient)


def prepare(loaded: LoadedModel) -> Following:
    """All that is quantized, norms and biases; raises ``CannotCompress`` for a model that is not quantized."""
    refuse_no_grid(loaded, "straight_through")
    forms = {module: tuple(_rule(form) for form in forms_of(p)) for module, p in loaded.packed.items()}
    return Following(loaded, forms, small(loaded))


def _rule(packed: PackedTensor) -> Rule:
    on_grid = isinstance(packed.scheme, IntegerScheme | TernaryScheme)
    assert on_grid or packed.scale is not None or isinstance(packed.scheme, FloatScheme)
    return OnGrid(packed) if on_grid else NarrowFloat(packed)
