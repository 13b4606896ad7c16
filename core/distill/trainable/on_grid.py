"""A changed weight on the grid it is stored on already: scales and zero points stay, only codes are chosen again.

Beyond the ends of a grid the end is taken. Where values share a scale, sums over them are taken here too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.integer import code_range, stored_scale
from core.numerics.minifloat import E2M1
from core.numerics.narrow import encode, grouped
from core.numerics.packed import E8M0_BIAS, PackedExperts, PackedTensor
from core.numerics.schemes import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    FloatScheme,
    IntegerScheme,
    MxScheme,
    Nvfp4Scheme,
    TernaryScheme,
)

if TYPE_CHECKING:
    from torch import Tensor


def on_own_grid(weight_RC: Tensor, packed: PackedTensor | PackedExperts) -> PackedTensor | PackedExperts:
    """The weight on the nearest points of the grid that ``packed`` is on."""
    if isinstance(packed, PackedExperts):
        return replace(packed, choices=tuple(nearest(weight_RC, choice) for choice in packed.choices))
    return nearest(weight_RC, packed)


def nearest(weight_RC: Tensor, packed: PackedTensor) -> PackedTensor:
    """The same for one form."""
    scheme, wide_RC = packed.scheme, weight_RC.float()
    match scheme:
        case FloatScheme():
            limit = torch.finfo(packed.codes.dtype).max
            scaled_RC = wide_RC if packed.scale is None else wide_RC / packed.spread_scale()
            codes_RC = scaled_RC.clamp(-limit, limit).to(packed.codes.dtype)
        case MxScheme():
            assert packed.scale is not None
            exponent_RG1 = (packed.scale.int() - E8M0_BIAS).unsqueeze(-1)
            blocks_RGK = grouped(wide_RC, packed.scale.shape[-1])
            codes_RC = encode(torch.ldexp(blocks_RGK, -exponent_RG1), scheme.minifloat).flatten(-2)
            codes_RC = codes_RC.view(packed.codes.dtype)
        case Nvfp4Scheme():
            assert packed.scale is not None
            assert packed.global_scale is not None
            scale_RG1 = (packed.scale.float() / packed.global_scale).unsqueeze(-1)
            codes_RC = encode(grouped(wide_RC, packed.scale.shape[-1]) / scale_RG1, E2M1).flatten(-2)
        case _:
            low, high = reach(packed)
            codes_RC = in_steps(wide_RC, packed).clamp_(low, high).round_().to(torch.int8)
    return replace(packed, codes=codes_RC)


def in_steps(weight_RC: Tensor, packed: PackedTensor) -> Tensor:
    """Where values lie among the codes of an integer grid, unrounded: W / s + z, [R, C] float32."""
    assert packed.scale is not None
    steps_RGK = grouped(weight_RC.float(), packed.scale.shape[-1]) / packed.scale.float().unsqueeze(-1)
    if packed.zero_point is not None:
        steps_RGK += packed.zero_point.unsqueeze(-1)
    return steps_RGK.flatten(-2)


def step_of(packed: PackedTensor) -> Tensor:
    """The distance between neighbours on the grid, in a shape that multiplies the weight, float32.

    Of narrow floats, where it grows with the value: that at the root mean square of each row.
    """
    match packed.scheme:
        case FloatScheme():
            relative = torch.finfo(packed.codes.dtype).eps
        case MxScheme():
            relative = 2.0**-packed.scheme.minifloat.mantissa_bits
        case Nvfp4Scheme():
            relative = 2.0**-E2M1.mantissa_bits
        case _:
            assert packed.scale is not None
            groups = packed.scale.float().unsqueeze(-1)
            return groups.expand(*groups.shape[:-1], packed.codes.shape[-1] // groups.shape[-2]).flatten(-2)
    return relative * packed.dequantize().float().square().mean(-1, keepdim=True).sqrt()


def reach(packed: PackedTensor) -> tuple[int, int]:
    """Smallest and largest code of an integer grid."""
    if isinstance(packed.scheme, TernaryScheme):
        return -1, 1
    assert isinstance(packed.scheme, IntegerScheme)
    return code_range(packed.scheme.bits)


def scaled(packed: PackedTensor, factor: Tensor) -> PackedTensor:
    """The same codes under scales that are multiplied by a factor, and rounded to what they are stored in.

    Of NVFP4 the global scales change, by which its blocks' are divided.
    """
    if packed.global_scale is not None:
        return replace(packed, global_scale=packed.global_scale / factor)
    assert packed.scale is not None
    return replace(packed, scale=stored_scale(packed.scale.float() * factor, packed.scale.dtype))


def summed(values_RC: Tensor, packed: PackedTensor) -> Tensor:
    """Sums over the values that share a scale, in the shape of those scales; NVFP4's global ones, not its blocks'."""
    assert packed.scale is not None
    scheme = packed.scheme
    whole = isinstance(scheme, Nvfp4Scheme) or getattr(scheme, "whole", False)
    if whole or (isinstance(scheme, FloatScheme) and scheme.scale == "tensor"):
        return values_RC.sum((-2, -1), keepdim=True)
    if isinstance(scheme, FloatScheme) and scheme.scale == "block":
        return _block_sums(values_RC)
    return grouped(values_RC, packed.scale.shape[-1]).sum(-1)


def _block_sums(values_RC: Tensor) -> Tensor:
    """Of every 128 × 128 block, the last of each axis possibly smaller."""
    rows, columns = values_RC.shape[-2:]
    padded = torch.nn.functional.pad(values_RC, (0, -columns % BLOCK_COLUMNS, 0, -rows % BLOCK_ROWS))
    down, across = padded.shape[-2] // BLOCK_ROWS, padded.shape[-1] // BLOCK_COLUMNS
    blocks = padded.reshape(*padded.shape[:-2], down, BLOCK_ROWS, across, BLOCK_COLUMNS)
    return blocks.sum((-3, -1))
