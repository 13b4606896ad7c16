"""Stored bytes by formula, before anything is written: n · b / 8 + scales + zero points + header.

Torch-free. A safetensors file is 8 bytes, a JSON header padded to 8 bytes, then the tensors
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.numerics.narrow import packed_bytes
from core.numerics.packing import packed_words
from core.numerics.schemes import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    FloatScheme,
    MxScheme,
    Nf4Scheme,
    Nvfp4Scheme,
    Scheme,
    TernaryScheme,
    groups_of,
)

ITEM_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
DTYPE_NAMES = {
    "float64": "F64", "int64": "I64", "float32": "F32", "int32": "I32", "float16": "F16", "bfloat16": "BF16",
    "int16": "I16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's names of dtypes → those in a safetensors header."""
FLOAT8_NAMES = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}
NESTED_BLOCK = 256
"""Block scales that are quantized together by NF4's double quantization."""


@dataclass(frozen=True)
class Entry:
    """One tensor a file will hold."""

    dtype: str
    """As in a safetensors header, e.g. ``F16``."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def entries_of(rows: int, columns: int, scheme: Scheme, *, scale_dtype: str = "F16") -> dict[str, Entry]:
    """What a file holds for one [rows, columns] weight under ``scheme``.

    By compressed-tensors' names; for NF4, which it does not know, by bitsandbytes'. ``scale_dtype`` is that of integer
    grids, whose scales may be stored in float16 or float32; every other format fixes its own.
    """
    match scheme:
        case FloatScheme():
            return _float_entries(rows, columns, scheme)
        case MxScheme():
            scale = {"weight_scale": Entry("U8", (rows, groups_of(columns, scheme.block)))}
            if scheme.bits == 8:
                return {"weight": Entry(FLOAT8_NAMES[scheme.element], (rows, columns)), **scale}
            return {"weight_packed": Entry("U8", (rows, packed_bytes(columns, scheme.bits))), **scale}
        case Nvfp4Scheme():
            return {
                "weight_packed": Entry("U8", (rows, packed_bytes(columns, 4))),
                "weight_scale": Entry("F8_E4M3", (rows, groups_of(columns, scheme.block))),
                "weight_global_scale": Entry("F32", (1,)),
            }
        case Nf4Scheme():
            return _nf4_entries(rows * columns, scheme)
        case TernaryScheme():
            return entries_of(rows, columns, scheme.carrier, scale_dtype=scale_dtype)
    groups = scheme.groups(columns)
    entries = {
        "weight_packed": Entry("I32", (rows, packed_words(columns, scheme.bits))),
        "weight_scale": Entry(scale_dtype, (1,) if scheme.whole else (rows, groups)),
        "weight_shape": Entry("I64", (2,)),
    }
    if not scheme.symmetric:
        zeros = 1 if scheme.whole else rows
        entries["weight_zero_point"] = Entry("I32", (packed_words(zeros, scheme.bits), groups))
    return entries


def _float_entries(rows: int, columns: int, scheme: FloatScheme) -> dict[str, Entry]:
    weight = {"weight": Entry(DTYPE_NAMES[scheme.dtype], (rows, columns))}
    if scheme.scale == "none":
        return weight
    blocks = (math.ceil(rows / BLOCK_ROWS), math.ceil(columns / BLOCK_COLUMNS))
    shape = {"tensor": (1,), "row": (rows, 1), "block": blocks}[scheme.scale]
    return {**weight, "weight_scale": Entry("F32", shape)}


def _nf4_entries(values: int, scheme: Nf4Scheme) -> dict[str, Entry]:
    blocks = math.ceil(values / scheme.block)
    entries = {
        "weight": Entry("U8", (math.ceil(values / 2), 1)),
        "weight.absmax": Entry("U8" if scheme.double else "F32", (blocks,)),
        "weight.quant_map": Entry("F32", (16,)),
    }
    if scheme.double:
        entries["weight.nested_absmax"] = Entry("F32", (math.ceil(blocks / NESTED_BLOCK),))
        entries["weight.nested_quant_map"] = Entry("F32", (256,))
    return entries


def weight_bytes(shape: Sequence[int], scheme: Scheme, *, scale_dtype: str = "F16") -> int:
    """Stored bytes of one weight of any leading shape, each 2-D slice stored on its own; header not counted."""
    *lead, rows, columns = shape
    parts = entries_of(rows, columns, scheme, scale_dtype=scale_dtype).values()
    return math.prod(lead) * sum(part.nbytes for part in parts)


def scheme_bits(shape: Sequence[int], scheme: Scheme, *, scale_dtype: str = "F16") -> float:
    """Bits per weight of one weight of this shape, scales and zero points included."""
    return weight_bytes(shape, scheme, scale_dtype=scale_dtype) * 8 / math.prod(shape)


def file_bytes(entries: Mapping[str, Entry]) -> int:
    """Bytes of a safetensors file with these tensors, header included."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (begin, end)}
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + math.ceil(text / 8) * 8 + end


def bits_per_weight(nbytes: int, parameters: int) -> float:
    """All bits of the weight files (scales, zero points and headers included) per parameter, tied ones once."""
    return nbytes * 8 / parameters
