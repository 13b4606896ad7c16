"""Names of number formats as plain data: what a weight is stored as, without any tensor.

Torch-free, so a page can compute a size before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GroupSize = Literal["32", "64", "128", "channel"]
NarrowDtype = Literal["bfloat16", "float16", "float8_e4m3fn"]
NARROW_BITS: dict[NarrowDtype, int] = {"bfloat16": 16, "float16": 16, "float8_e4m3fn": 8}


@dataclass(frozen=True)
class IntegerScheme:
    """A uniform grid of 2^bits integer codes, one scale (and zero point) per group of a row."""

    bits: int
    group_size: int | None
    """Consecutive values of a row that share a scale; None: the whole row ("channel")."""
    symmetric: bool
    """Symmetric: zero point 0, scale max|W| / ((2^bits - 1) / 2). Affine: the grid spans min(W, 0) … max(W, 0)."""

    def groups(self, columns: int) -> int:
        """Scales per row of ``columns`` values; the group size must divide them."""
        if self.group_size is None:
            return 1
        assert columns % self.group_size == 0, f"group size {self.group_size} does not divide {columns}"
        return columns // self.group_size

    @property
    def label(self) -> str:
        """A short name, e.g. ``int4 g32 affine``."""
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits} {group} {'symmetric' if self.symmetric else 'affine'}"


@dataclass(frozen=True)
class FloatScheme:
    """A narrow float without scales: each value rounded to nearest-even on its own."""

    dtype: NarrowDtype

    @property
    def bits(self) -> int:
        """Bits per value."""
        return NARROW_BITS[self.dtype]

    @property
    def label(self) -> str:
        """The dtype's name."""
        return self.dtype


Scheme = IntegerScheme | FloatScheme
