"""Tensors of narrow floats as codes, and codes packed into bytes.

The rounding is ``Minifloat.encode``'s, on float32 tensors. Four-bit codes are stored two to a byte, the first in the
low half; six-bit codes four to three bytes, lowest bits first (compressed-tensors ``nvfp4``/``mxfp4``/``mxfp6``
``-pack-quantized``).

Legend: ``R`` leading axes, ``C`` columns, ``B`` bytes of a row.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.minifloat import Minifloat

if TYPE_CHECKING:
    from torch import Tensor

MANTISSA, EXPONENT_BIAS = 23, 127
"""Of float32."""


def encode(values_RC: Tensor, to: Minifloat) -> Tensor:
    """Codes (uint8) of the nearest numbers, ties to even; beyond the largest the largest is taken."""
    magnitude_RC = values_RC.float().abs().clamp_(max=to.largest)
    exponent_RC = (magnitude_RC.view(torch.int32) >> MANTISSA) - EXPONENT_BIAS
    exponent_RC = exponent_RC.clamp_(min=1 - to.bias)
    steps_RC = torch.ldexp(magnitude_RC, to.mantissa_bits - exponent_RC).round_().to(torch.int32)
    code_RC = (exponent_RC - (1 - to.bias) << to.mantissa_bits) + steps_RC
    sign_RC = values_RC.signbit().to(torch.int32) << (to.bits - 1)
    return (code_RC | sign_RC).to(torch.uint8)


def decode(codes_RC: Tensor, of: Minifloat) -> Tensor:
    """The numbers that codes mean, float32."""
    return _table(of).to(codes_RC.device)[codes_RC.int()]


@cache
def _table(of: Minifloat) -> Tensor:
    return torch.tensor(of.decode(range(1 << of.bits)), dtype=torch.float32)


def grouped(values_RC: Tensor, groups: int) -> Tensor:
    """Rows cut into groups: [R, G, C / G]."""
    return values_RC.reshape(*values_RC.shape[:-1], groups, -1)


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of ``columns`` codes of 4, 6 or 8 bits; an incomplete last run of codes is not allowed."""
    run = {4: 2, 6: 4, 8: 1}[bits]
    assert columns % run == 0, (
        f"{columns} codes of {bits} bits do not fill whole bytes; they come in runs of {run}"
    )
    return columns * bits // 8


def pack_codes(codes_RC: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, 4 or 6 bits each, as bytes [R, B]."""
    lead, columns = codes_RC.shape[:-1], codes_RC.shape[-1]
    packed_bytes(columns, bits)
    if bits == 4:
        pairs = codes_RC.reshape(*lead, -1, 2)
        return pairs[..., 0] | pairs[..., 1] << 4
    fours = codes_RC.reshape(*lead, -1, 4).int()
    word = fours[..., 0] | fours[..., 1] << 6 | fours[..., 2] << 12 | fours[..., 3] << 18
    return torch.stack([word & 255, word >> 8 & 255, word >> 16], dim=-1).to(torch.uint8).reshape(*lead, -1)


def unpack_codes(packed_RB: Tensor, bits: int) -> Tensor:
    """Undo ``pack_codes``: uint8 [R, C]."""
    lead = packed_RB.shape[:-1]
    if bits == 4:
        return torch.stack([packed_RB & 15, packed_RB >> 4], dim=-1).reshape(*lead, -1)
    threes = packed_RB.reshape(*lead, -1, 3).int()
    word = threes[..., 0] | threes[..., 1] << 8 | threes[..., 2] << 16
    return (
        torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], dim=-1)
        .to(torch.uint8)
        .reshape(*lead, -1)
    )
