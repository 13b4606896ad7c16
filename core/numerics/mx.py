"""Microscaling formats: 32 narrow floats of a row share a power of two (OCP Microscaling Formats v1.0).

The power of two 2^e is stored as E8M0, the byte e + 127. With m the largest magnitude of a block, L the element
format's largest number and E = ⌊log2 L⌋:

* floor: e = ⌊log2 m⌋ - E, the specification's; numbers above L · 2^e are clipped to it;
* ceil: the smallest e with m ≤ L · 2^e: nothing is clipped, up to one bit of resolution is lost ("RCEIL");
* even: floor, after rounding m to the element's mantissa width: one higher where m would round up beyond L · 2^e.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.minifloat import Minifloat
from core.numerics.narrow import EXPONENT_BIAS, MANTISSA, encode, grouped
from core.numerics.packed import E8M0_BIAS, PackedTensor
from core.numerics.schemes import MxScheme, ScaleRule, groups_of

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_E8M0 = 254
"""255 is NaN."""


def quantize(weight_RC: Tensor, scheme: MxScheme) -> PackedTensor:
    """Round a weight of any leading shape; the block size must divide its columns."""
    columns = weight_RC.shape[-1]
    blocks_RGK = grouped(weight_RC.float(), groups_of(columns, scheme.block))
    scale_RG = shared_exponent(blocks_RGK.abs().amax(-1), scheme.minifloat, scheme.rule)
    exponent_RG1 = (scale_RG.int() - E8M0_BIAS).unsqueeze(-1)
    codes_RC = encode(torch.ldexp(blocks_RGK, -exponent_RG1), scheme.minifloat).flatten(-2)
    if scheme.bits == 8:
        codes_RC = codes_RC.view(getattr(torch, FLOAT8[scheme.element]))
    return PackedTensor(codes_RC, scale_RG, None, scheme)


FLOAT8 = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
"""8-bit elements are stored as torch's own floats."""


def shared_exponent(largest_RG: Tensor, element: Minifloat, rule: ScaleRule) -> Tensor:
    """E8M0 byte of blocks with these largest magnitudes; 0 for blocks of zeros."""
    bits_RG = largest_RG.float().contiguous().view(torch.int32)
    if rule == "even":
        bits_RG = bits_RG + (1 << (MANTISSA - element.mantissa_bits - 1))
    exponent_RG = (bits_RG >> MANTISSA) - EXPONENT_BIAS - element.largest_exponent
    if rule == "ceil":
        # Compared as mantissas in [1, 2), so that no division rounds.
        mantissa_RG = torch.ldexp(largest_RG.float(), -(exponent_RG + element.largest_exponent))
        exponent_RG += (mantissa_RG > element.largest / 2.0**element.largest_exponent).int()
    return (exponent_RG + E8M0_BIAS).clamp_(0, LARGEST_E8M0).to(torch.uint8)
