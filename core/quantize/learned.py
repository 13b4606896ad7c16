"""Roundings of one weight as a differentiable function of what is learned about them.

Ŵ = s · (clamp(round(W / s + z + V)) - z): V shifts each value by up to half a step, and α, β in [0, 1] narrow the range
that each group's scale s spans (https://arxiv.org/abs/2309.05516). round passes gradients on as if it were not there.
At V = 0 and α = β = 1 this is rounding to nearest, bit for bit.

Legend: ``R`` leading axes, ``G`` groups of a row, ``K`` values of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.integer import code_range, stored_scale
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme
from core.quantize.grid_fit import grouped

if TYPE_CHECKING:
    from torch import Tensor

REACH = 0.5
"""Largest shift of a value, in steps of its grid."""


@dataclass(eq=False)
class Rounding:
    """What is learned about one weight, beginning at rounding to nearest."""

    weight_RGK: Tensor
    scheme: IntegerScheme
    scale_dtype: torch.dtype
    shift_RGK: Tensor
    """V."""
    reach_RG2: Tensor
    """β and α: the shares of the smallest and of the largest value that the grid spans."""

    @classmethod
    def nearest(cls, weight_RC: Tensor, packed: PackedTensor) -> Rounding:
        """Of a weight that is rounded to nearest as ``packed``."""
        assert isinstance(packed.scheme, IntegerScheme)
        assert packed.scale is not None
        groups_RGK = grouped(weight_RC, packed.scheme).clone()
        reach_RG2 = groups_RGK.new_ones(*groups_RGK.shape[:-1], 2)
        return cls(groups_RGK, packed.scheme, packed.scale.dtype, torch.zeros_like(groups_RGK), reach_RG2)

    @property
    def learned(self) -> tuple[Tensor, Tensor]:
        """What a gradient is taken of."""
        return self.shift_RGK, self.reach_RG2

    def values(self) -> Tensor:
        """Ŵ [R, C] in float32, differentiable in what is learned."""
        code_RGK, scale_RG, zero_RG = self._parts()
        steps_RGK = code_RGK if zero_RG is None else code_RGK - zero_RG.unsqueeze(-1)
        return (steps_RGK * scale_RG.unsqueeze(-1)).flatten(-2)

    def packed(self) -> PackedTensor:
        """The weight as it is stored."""
        with torch.no_grad():
            code_RGK, scale_RG, zero_RG = self._parts()
        zero = None if zero_RG is None else zero_RG.to(torch.int8)
        codes_RC = code_RGK.flatten(-2).to(torch.int8)
        return PackedTensor(codes_RC, scale_RG.to(self.scale_dtype), zero, self.scheme)

    def step(self, rate: float) -> None:
        """Move everything learned by ``rate`` against the sign of its gradient, within its bounds; forgets gradients."""
        for learned, (least, most) in zip(self.learned, ((-REACH, REACH), (0.0, 1.0)), strict=True):
            assert learned.grad is not None
            learned.data.sub_(learned.grad.sign(), alpha=rate).clamp_(least, most)
            learned.grad = None

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes [R, G, K], scales and zero points [R, G] in float32: ``core.numerics.integer``'s arithmetic."""
        low, high = code_range(self.scheme.bits)
        steps = high - low
        lowest_RG, highest_RG = self.weight_RGK.aminmax(dim=-1)
        lowest_RG, highest_RG = lowest_RG * self.reach_RG2[..., 0], highest_RG * self.reach_RG2[..., 1]
        if self.scheme.symmetric:
            scale_RG = torch.maximum(-lowest_RG, highest_RG) / (steps / 2)
        else:
            scale_RG = (highest_RG.clamp(min=0) - lowest_RG.clamp(max=0)) / steps
        scale_RG = torch.where(scale_RG == 0, torch.ones_like(scale_RG), scale_RG)
        scale_RG = _through(scale_RG, stored_scale(scale_RG, self.scale_dtype).float())
        scaled_RGK = self.weight_RGK / scale_RG.unsqueeze(-1)
        zero_RG = None
        if not self.scheme.symmetric:
            exact_RG = (low - lowest_RG.clamp(max=0) / scale_RG).clamp(low, high)
            zero_RG = _through(exact_RG, exact_RG.round())
            scaled_RGK = scaled_RGK + zero_RG.unsqueeze(-1)
        shifted_RGK = (scaled_RGK + self.shift_RGK).clamp(low, high)
        return _through(shifted_RGK, shifted_RGK.round()), scale_RG, zero_RG


def _through(exact: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``exact``."""
    return exact + (rounded - exact).detach()
