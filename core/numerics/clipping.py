"""Which weights a format cut off and which it made zero: what an error alone does not say.

A weight is clipped where its format ends before it: it lies beyond the last value of its block's grid by more than half
the distance of the last two. It knows no models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.integer import code_range
from core.numerics.minifloat import BFLOAT16, E2M1, E4M3, E5M2, FLOAT16, Minifloat
from core.numerics.narrow import grouped
from core.numerics.nf4 import PackedNf4
from core.numerics.packed import E8M0_BIAS, PackedTensor
from core.numerics.schemes import FloatScheme, IntegerScheme, MxScheme, TernaryScheme

if TYPE_CHECKING:
    from torch import Tensor

SLACK = 1 + 2.0**-10
"""Scales are kept in float16, which may move the end of a grid by 2^-11 of itself."""
ELEMENTS: dict[str, Minifloat] = {
    "bfloat16": BFLOAT16, "float16": FLOAT16, "float8_e4m3fn": E4M3, "float8_e5m2": E5M2,
}  # fmt: skip


def block_scale(packed: PackedTensor | PackedNf4) -> Tensor:
    """What every value's code was multiplied by, float32, in a shape that multiplies the weight [R, C]."""
    if isinstance(packed, PackedNf4):
        wide = packed.scales().repeat_interleave(packed.scheme.block)
        return wide[: packed.codes.numel()].view(packed.codes.shape)
    columns = packed.codes.shape[-1]
    if packed.scale is None:
        return torch.ones(1, device=packed.codes.device)
    scale = packed.scale.float()
    if isinstance(packed.scheme, FloatScheme):
        return packed.spread_scale()
    if isinstance(packed.scheme, MxScheme):
        scale = torch.exp2(scale - E8M0_BIAS)
    if packed.global_scale is not None:
        scale = scale / packed.global_scale
    return scale.repeat_interleave(columns // scale.shape[-1], -1)


def clipped(weight_RC: Tensor, packed: PackedTensor | PackedNf4) -> Tensor:
    """Whether each weight [R, C] lies beyond its block's grid."""
    scaled_RC = grid_positions(weight_RC, packed)
    scheme = packed.scheme
    if isinstance(scheme, IntegerScheme):
        low, high = code_range(scheme.bits)
        return (scaled_RC > (high + 0.5) * SLACK) | (scaled_RC < (low - 0.5) * SLACK)
    if isinstance(scheme, TernaryScheme):
        return scaled_RC.abs() > 1.5
    if isinstance(packed, PackedNf4):
        return torch.zeros_like(scaled_RC, dtype=torch.bool)
    element = E2M1
    if isinstance(scheme, MxScheme):
        element = scheme.minifloat
    elif isinstance(scheme, FloatScheme):
        element = ELEMENTS[scheme.dtype]
    return scaled_RC.abs() > (element.largest + element.spacing(element.largest) / 2) * SLACK


def zeroed(weight_RC: Tensor, rounded_RC: Tensor) -> Tensor:
    """Whether each weight [R, C] that was not zero is now."""
    return (rounded_RC == 0) & (weight_RC != 0)


def grid_positions(weight_RC: Tensor, packed: PackedTensor | PackedNf4) -> Tensor:
    """Where each weight lies on its block's grid before rounding: W / s (+ z), the grid's own units."""
    scaled_RC = weight_RC.float() / block_scale(packed)
    if isinstance(packed, PackedTensor) and packed.zero_point is not None:
        scaled = grouped(scaled_RC, packed.zero_point.shape[-1]) + packed.zero_point.float().unsqueeze(-1)
        scaled_RC = scaled.flatten(-2)
    return scaled_RC
