"""Narrow floats: 16-bit ones and unscaled float8 by a plain cast, float8 with scales as compressed-tensors has it.

s = max|W| / largest over a matrix, a row, or a block of 128 × 128; code = round(clamp(W / s)); Ŵ = code · s in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.packed import PackedTensor, narrow
from core.numerics.schemes import BLOCK_COLUMNS, BLOCK_ROWS, FloatScheme

if TYPE_CHECKING:
    from torch import Tensor


def quantize(weight_RC: Tensor, scheme: FloatScheme) -> PackedTensor:
    """Round to the nearest narrow float; without scales every value must be in the format's range."""
    if scheme.scale == "none":
        return narrow(weight_RC, scheme)
    dtype: torch.dtype = getattr(torch, scheme.dtype)
    limit = torch.finfo(dtype).max
    magnitude_RC = weight_RC.float().abs()
    if scheme.scale == "block":
        largest = _block_largest(magnitude_RC)
    else:
        axes = (-1,) if scheme.scale == "row" else (-2, -1)
        largest = magnitude_RC.amax(axes, keepdim=True)
    scale = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    empty = PackedTensor(weight_RC, scale, None, scheme)
    codes_RC = (weight_RC.float() / empty.spread_scale()).clamp_(-limit, limit).to(dtype)
    return PackedTensor(codes_RC, scale, None, scheme)


def _block_largest(magnitude_RC: Tensor) -> Tensor:
    """Largest of every 128 × 128 block, the last of each axis possibly smaller."""
    rows, columns = magnitude_RC.shape[-2:]
    padding = (0, -columns % BLOCK_COLUMNS, 0, -rows % BLOCK_ROWS)
    padded = torch.nn.functional.pad(magnitude_RC, padding)
    down, across = padded.shape[-2] // BLOCK_ROWS, padded.shape[-1] // BLOCK_COLUMNS
    blocks = padded.reshape(*padded.shape[:-2], down, BLOCK_ROWS, across, BLOCK_COLUMNS)
    return blocks.amax((-3, -1))
