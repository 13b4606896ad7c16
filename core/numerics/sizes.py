"""Stored bytes by formula, before anything is written: n · b / 8 + scales + zero points + header.

Torch-free. A safetensors file is 8 bytes, a JSON header padded to 8 bytes, then the tensors
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.numerics.packing import packed_words
from core.numerics.schemes import FloatScheme, IntegerScheme, Scheme

ITEM_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "F8_E4M3": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
DTYPE_NAMES = {
    "float64": "F64", "int64": "I64", "float32": "F32", "int32": "I32", "float16": "F16", "bfloat16": "BF16",
    "int16": "I16", "float8_e4m3fn": "F8_E4M3", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's names of dtypes → those in a safetensors header."""


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
    """What a file holds for one [rows, columns] weight under ``scheme``, by compressed-tensors' names."""
    if isinstance(scheme, FloatScheme):
        return {"weight": Entry(DTYPE_NAMES[scheme.dtype], (rows, columns))}
    groups = scheme.groups(columns)
    entries = {
        "weight_packed": Entry("I32", (rows, packed_words(columns, scheme.bits))),
        "weight_scale": Entry(scale_dtype, (rows, groups)),
        "weight_shape": Entry("I64", (2,)),
    }
    if not scheme.symmetric:
        entries["weight_zero_point"] = Entry("I32", (packed_words(rows, scheme.bits), groups))
    return entries


def weight_bytes(
    shape: Sequence[int], scheme: IntegerScheme | FloatScheme, *, scale_dtype: str = "F16"
) -> int:
    """Stored bytes of one weight of any leading shape, each 2-D slice stored on its own; header not counted."""
    *lead, rows, columns = shape
    parts = entries_of(rows, columns, scheme, scale_dtype=scale_dtype).values()
    return math.prod(lead) * sum(part.nbytes for part in parts)


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
