"""Round-to-nearest on integer grids: find a grid, put weights on it, read them back.

The arithmetic is that of compressed-tensors (``calculate_qparams``, ``quantize``, ``dequantize``), so that what
is computed here is, bit for bit, what a reload gives:

* symmetric: s = max|W| / ((2^b - 1) / 2), z = 0: |W - Ŵ| ≤ s / 2 everywhere, the clipped extreme included;
* affine: s = (max(W, 0) - min(W, 0)) / (2^b - 1), z = round(-2^(b-1) - min(W, 0) / s): zero is on the grid;
* code = round(clamp(W / s + z, -2^(b-1), 2^(b-1) - 1)), ties to even; Ŵ = (code - z) · s.

Legend: ``R`` leading axes, ``C`` columns, ``G`` groups of a row, ``K`` values of a group (C = G · K).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme

if TYPE_CHECKING:
    from torch import Tensor


def quantize(
    weight_RC: Tensor, scheme: IntegerScheme, *, scale_dtype: torch.dtype | None = None
) -> PackedTensor:
    """Round a weight of any leading shape to nearest on its grid.

    ``scale_dtype`` is what scales are stored in, and codes are chosen against the stored scale; None takes
    ``storable_dtype``.
    """
    *lead, columns = weight_RC.shape
    groups_RGK = weight_RC.float().reshape(*lead, scheme.groups(columns), -1)
    scale_RG = _scale(groups_RGK, scheme)
    scale_RG = scale_RG.to(storable_dtype(scale_RG) if scale_dtype is None else scale_dtype)
    low, high = code_range(scheme.bits)
    scaled_RGK = groups_RGK / scale_RG.float().unsqueeze(-1)
    zero_RG = None
    if not scheme.symmetric:
        lowest_RG = groups_RGK.amin(-1).clamp(max=0)
        zero_RG = (low - lowest_RG / scale_RG.float()).clamp_(low, high).round_().to(torch.int8)
        scaled_RGK += zero_RG.unsqueeze(-1)
    codes_RC = scaled_RGK.clamp_(low, high).round_().to(torch.int8).flatten(-2)
    return PackedTensor(codes_RC, scale_RG, zero_RG, scheme)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of ``bits`` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def storable_dtype(scale_RG: Tensor) -> torch.dtype:
    """float16 where every scale is one of its normal numbers (6.1e-5 … 65504), else float32."""
    limits = torch.finfo(torch.float16)
    fits = bool((scale_RG >= limits.smallest_normal).all() and (scale_RG <= limits.max).all())
    return torch.float16 if fits else torch.float32


def _scale(groups_RGK: Tensor, scheme: IntegerScheme) -> Tensor:
    steps = (1 << scheme.bits) - 1
    if scheme.symmetric:
        scale_RG = groups_RGK.abs().amax(-1) / (steps / 2)
    else:
        scale_RG = (groups_RGK.amax(-1).clamp(min=0) - groups_RGK.amin(-1).clamp(max=0)) / steps
    # An all-zero group is exact at any scale.
    return torch.where(scale_RG == 0, torch.ones_like(scale_RG), scale_RG)
