"""NVFP4: e2m1 in blocks of 16, an e4m3 scale for each block, one float32 scale for the matrix.

g = 448 · 6 / max|W|, so that the largest block scale becomes e4m3's largest; s = e4m3(g · max|block| / 6);
code = e2m1(clamp(W / (s / g))); Ŵ = code · (s / g), which compressed-tensors rounds to bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.minifloat import E2M1, E4M3
from core.numerics.narrow import encode, grouped
from core.numerics.packed import PackedTensor
from core.numerics.schemes import Nvfp4Scheme, groups_of

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE = 0.125
"""What compressed-tensors stores for a block whose scale rounds to 0."""


def quantize(weight_RC: Tensor, scheme: Nvfp4Scheme) -> PackedTensor:
    """Round a weight of any leading shape, each 2-D slice with its own global scale; 16 must divide its columns."""
    columns = weight_RC.shape[-1]
    wide_RC = weight_RC.float()
    blocks_RGK = grouped(wide_RC, groups_of(columns, scheme.block))
    largest_11 = wide_RC.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    global_11 = (E4M3.largest * E2M1.largest / largest_11).nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)
    scale_RG = (global_11 * (blocks_RGK.abs().amax(-1) / E2M1.largest)).clamp(max=E4M3.largest)
    scale_RG = scale_RG.to(torch.float8_e4m3fn)
    scale_RG = torch.where(scale_RG.float() == 0, SMALLEST_SCALE, scale_RG.float()).to(torch.float8_e4m3fn)
    codes_RGK = encode(blocks_RGK / (scale_RG.float() / global_11).unsqueeze(-1), E2M1)
    return PackedTensor(codes_RGK.flatten(-2), scale_RG, None, scheme, global_11)
