"""Dense packing of 2- to 8-bit integer codes into 32-bit words, as compressed-tensors stores them.

Element i of a row occupies the bits i·b … i·b + b - 1 of the row, counted from the lowest bit of its first word;
an element may straddle two words, and no bit is wasted but at a row's end (format: compressed-tensors
``pack_quantized``, dense packing). Codes are signed, stored with an offset of 2^(b-1). On a little-endian machine
that bit stream is the same in bytes as in words, so the work is done in bytes: the smallest run after which
elements and bytes align again is a period, e.g. 8 elements in 3 bytes at 3 bits.

Legend: ``R`` rows, ``C`` columns, ``W`` words per row = ⌈C · b / 32⌉, ``N`` periods of a row, ``E`` elements of a
period, ``Y`` bytes of a period.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WORD_BYTES = 4
assert sys.byteorder == "little", "packed weights are laid out for little-endian machines"


def packed_words(columns: int, bits: int) -> int:
    """32-bit words that hold a row of ``columns`` codes: ⌈columns · bits / 32⌉."""
    return math.ceil(columns * bits / 32)


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Pack int8 codes in -2^(bits-1) … 2^(bits-1) - 1 along the last axis: int32 [R, W]."""
    rows, columns = codes_RC.shape
    elements, nbytes = _period(bits)
    periods = math.ceil(columns / elements)
    # Adding 2^(bits-1) modulo 256 makes the codes unsigned, also where the sum leaves int8.
    unsigned_RC = codes_RC.view(torch.uint8) + (1 << (bits - 1))
    values_RNE = torch.nn.functional.pad(unsigned_RC, (0, periods * elements - columns)).view(
        rows, periods, elements
    )
    out_RNY = torch.zeros(rows, periods, nbytes, dtype=torch.uint8, device=codes_RC.device)
    for element in range(elements):
        byte, offset = divmod(element * bits, 8)
        out_RNY[..., byte] |= values_RNE[..., element] << offset
        if offset + bits > 8:
            out_RNY[..., byte + 1] |= values_RNE[..., element] >> (8 - offset)
    # Whole words: zeros up to the next one, or less than the last period's bytes.
    stream_RB = out_RNY.view(rows, periods * nbytes)
    words_RB = torch.zeros(
        rows, packed_words(columns, bits) * WORD_BYTES, dtype=torch.uint8, device=codes_RC.device
    )
    used = min(stream_RB.shape[1], words_RB.shape[1])
    words_RB[:, :used] = stream_RB[:, :used]
    return words_RB.view(torch.int32)


def unpack(packed_RW: Tensor, bits: int, columns: int) -> Tensor:
    """Undo ``pack``: int8 codes [R, C]."""
    rows = packed_RW.shape[0]
    elements, nbytes = _period(bits)
    periods = math.ceil(columns / elements)
    held_RB = packed_RW.contiguous().view(torch.uint8)
    padded_RB = torch.nn.functional.pad(held_RB, (0, periods * nbytes - held_RB.shape[1]))
    bytes_RNY = padded_RB.view(rows, periods, nbytes)
    out_RNE = torch.empty(rows, periods, elements, dtype=torch.uint8, device=packed_RW.device)
    for element in range(elements):
        byte, offset = divmod(element * bits, 8)
        value_RN = bytes_RNY[..., byte] >> offset
        if offset + bits > 8:
            value_RN = value_RN | (bytes_RNY[..., byte + 1] << (8 - offset))
        out_RNE[..., element] = (value_RN & ((1 << bits) - 1)) - (1 << (bits - 1))
    return out_RNE.view(rows, periods * elements)[:, :columns].contiguous().view(torch.int8)


def _period(bits: int) -> tuple[int, int]:
    """The shortest run after which elements and bytes align again: (elements, bytes)."""
    shared = math.lcm(bits, 8)
    return shared // bits, shared // 8
