"""Round-to-nearest on integer grids: find a grid, put weights on it, read them back.

The arithmetic is that of compressed-tensors (``calculate_qparams``, ``quantize``, ``dequantize``), so that what
is computed here is, bit for bit, what a reload gives:

* symmetric: s = max|W| / ((2^b - 1) / 2), z = 0: |W - Ŵ| ≤ s / 2 everywhere, the clipped extreme included;
* affine: s = (max(W, 0) - min(W, 0)) / (2^b - 1), z = round(-2^(b-1) - min(W, 0) / s): zero is on the grid, and
  rounding z may cost one end of the range another s / 2;
* code = round(clamp(W / s + z, -2^(b-1), 2^(b-1) - 1)), ties to even; Ŵ = (code - z) · s.

The bounds are those of exact scales: storing s and Ŵ in float16 adds up to 2^-11 of each.

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
    ``storable_dtype``. A weight that is not finite makes its group's scale so.
    """
    *lead, columns = weight_RC.shape
    groups_RGK = weight_RC.float().reshape(*lead, scheme.groups(columns), -1)
    lowest_RG, highest_RG = groups_RGK.aminmax(dim=-1)
    if scheme.whole:
        lowest_RG, highest_RG = lowest_RG.amin(-2, keepdim=True), highest_RG.amax(-2, keepdim=True)
    scale_RG = _scale(lowest_RG, highest_RG, scheme)
    scale_RG = stored_scale(scale_RG, scale_dtype or storable_dtype(scale_RG, bits=scheme.bits))
    low, high = code_range(scheme.bits)
    scaled_RGK = groups_RGK / scale_RG.float().unsqueeze(-1)
    zero_RG = None
    if not scheme.symmetric:
        zero_RG = (low - lowest_RG.clamp(max=0) / scale_RG.float()).clamp_(low, high).round_().to(torch.int8)
        scaled_RGK += zero_RG.unsqueeze(-1)
    codes_RC = scaled_RGK.clamp_(low, high).round_().to(torch.int8).flatten(-2)
    return PackedTensor(codes_RC, scale_RG, zero_RG, scheme)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of ``bits`` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def storable_dtype(scale_RG: Tensor, *, bits: int) -> torch.dtype:
    """float16 where every scale is a normal number of it (from 6.1e-5) and every product with a code is below its
    end (65504), else float32."""
    limits = torch.finfo(torch.float16)
    smallest, largest = scale_RG.aminmax()
    fits = smallest >= limits.smallest_normal and largest * (1 << bits) <= limits.max
    return torch.float16 if fits else torch.float32


def stored_scale(scale_RG: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype they are stored in; one too small for it becomes its smallest number, never 0."""
    limits = torch.finfo(dtype)
    return scale_RG.clamp(min=limits.smallest_normal * limits.eps).to(dtype)


def _scale(lowest_RG: Tensor, highest_RG: Tensor, scheme: IntegerScheme) -> Tensor:
    steps = (1 << scheme.bits) - 1
    if scheme.symmetric:
        scale_RG = torch.maximum(-lowest_RG, highest_RG) / (steps / 2)
    else:
        scale_RG = (highest_RG.clamp(min=0) - lowest_RG.clamp(max=0)) / steps
    # An all-zero group is exact at any scale.
    return torch.where(scale_RG == 0, torch.ones_like(scale_RG), scale_RG)
