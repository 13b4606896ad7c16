"""Slow, obvious versions of the integer grids and of bit packing: one Python number at a time."""

from __future__ import annotations

from collections.abc import Sequence


def rtn_row(
    values: Sequence[float], bits: int, group: int, *, symmetric: bool
) -> list[tuple[int, float, int]]:
    """(code, scale, zero point) of every value of one row, in exact double arithmetic."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    out = []
    for start in range(0, len(values), group):
        part = values[start : start + group]
        if symmetric:
            scale, zero = max(abs(v) for v in part) / ((2**bits - 1) / 2), 0
        else:
            least, most = min(0.0, *part), max(0.0, *part)
            scale = (most - least) / (2**bits - 1)
            zero = min(max(round(low - least / scale), low), high)
        out += [(round(min(max(v / scale + zero, low), high)), scale, zero) for v in part]
    return out


def pack_row(codes: Sequence[int], bits: int) -> list[int]:
    """32-bit words (unsigned) of a row of signed codes, written bit by bit."""
    stream = [((code + 2 ** (bits - 1)) >> bit) & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 32)
    return [sum(bit << i for i, bit in enumerate(stream[w : w + 32])) for w in range(0, len(stream), 32)]
