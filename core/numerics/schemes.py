"""Names of number formats as plain data: what a weight is stored as, without any tensor.

Torch-free, so a page can compute a size before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.numerics.minifloat import MINIFLOATS, Minifloat

GroupSize = Literal["32", "64", "128", "channel"]
NarrowDtype = Literal["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
NARROW_BITS: dict[NarrowDtype, int] = {"bfloat16": 16, "float16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}
FloatScale = Literal["none", "tensor", "row", "block"]
MxElement = Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"]
ScaleRule = Literal["floor", "ceil", "even"]
TernaryRule = Literal["optimal", "absmean"]
BLOCK_ROWS = BLOCK_COLUMNS = 128
"""A block of the block-scaled float8, as DeepSeek-V3 has it."""


def groups_of(columns: int, group_size: int | None) -> int:
    """Scales per row of ``columns`` values; the group size must divide them. None: one."""
    if group_size is None:
        return 1
    assert columns % group_size == 0, f"group size {group_size} does not divide {columns}"
    return columns // group_size


@dataclass(frozen=True)
class IntegerScheme:
    """A uniform grid of 2^bits integer codes, one scale (and zero point) per group of a row."""

    bits: int
    group_size: int | None
    """Consecutive values of a row that share a scale; None: the whole row ("channel")."""
    symmetric: bool
    """Symmetric: zero point 0, scale max|W| / ((2^bits - 1) / 2). Affine: the grid spans min(W, 0) … max(W, 0)."""
    whole: bool = False
    """One scale for the whole matrix ("tensor"); the group size must then be None."""

    def groups(self, columns: int) -> int:
        """Scales per row of ``columns`` values; the group size must divide them."""
        return groups_of(columns, self.group_size)

    @property
    def span(self) -> str:
        """What shares a scale: ``g32``, ``channel`` or ``tensor``."""
        if self.whole:
            return "tensor"
        return "channel" if self.group_size is None else f"g{self.group_size}"

    @property
    def label(self) -> str:
        """A short name, e.g. ``int4 g32 affine``."""
        return f"int{self.bits} {self.span} {'symmetric' if self.symmetric else 'affine'}"


@dataclass(frozen=True)
class FloatScheme:
    """A narrow float, each value rounded to nearest-even; float8 optionally with float32 scales."""

    dtype: NarrowDtype
    scale: FloatScale = "none"
    """What shares a scale, by which its largest value becomes the format's largest; block: 128 × 128 values."""

    @property
    def bits(self) -> int:
        """Bits per value."""
        return NARROW_BITS[self.dtype]

    @property
    def label(self) -> str:
        """The dtype's name, and what shares a scale."""
        return self.dtype if self.scale == "none" else f"{self.dtype} {self.scale}"


@dataclass(frozen=True)
class MxScheme:
    """A microscaling format: 32 consecutive narrow floats of a row share a power of two (OCP MX v1.0)."""

    element: MxElement
    rule: ScaleRule = "even"
    """How the power of two is chosen from the block's largest value; see ``core.numerics.mx``."""
    block: int = 32

    @property
    def minifloat(self) -> Minifloat:
        """The element format."""
        return MINIFLOATS[self.element]

    @property
    def bits(self) -> int:
        """Bits per value without scales."""
        return self.minifloat.bits

    @property
    def label(self) -> str:
        """A short name, e.g. ``mxfp4 even``; the two 6-bit and the two 8-bit formats are told apart by element."""
        return f"mxfp{self.bits} {self.element} {self.rule}"


@dataclass(frozen=True)
class Nvfp4Scheme:
    """e2m1 in blocks of 16 with an e4m3 scale each, and one float32 scale for the matrix."""

    block: int = 16

    @property
    def bits(self) -> int:
        """Bits per value without scales."""
        return 4

    @property
    def label(self) -> str:
        """Its name."""
        return "nvfp4"


@dataclass(frozen=True)
class Nf4Scheme:
    """Sixteen quantiles of a normal distribution, scaled by the largest of each block of 64 (QLoRA)."""

    double: bool = False
    """Whether the blocks' scales are themselves stored in 8 bits, 256 together ("double quantization")."""
    block: int = 64

    @property
    def bits(self) -> int:
        """Bits per value without scales."""
        return 4

    @property
    def label(self) -> str:
        """Its name."""
        return "nf4 double" if self.double else "nf4"


@dataclass(frozen=True)
class TernaryScheme:
    """-s, 0 or s: three values, stored as 2-bit integer codes."""

    group_size: int | None
    """Consecutive values of a row that share s; None: the whole row."""
    rule: TernaryRule = "optimal"
    """optimal: the s that moves the group least (least squares); absmean: s = mean|W|, as BitNet b1.58 has it."""

    @property
    def bits(self) -> int:
        """Bits per value as they are stored; three values carry log2(3) = 1.58 bits."""
        return 2

    @property
    def carrier(self) -> IntegerScheme:
        """The integer grid whose codes -1, 0 and 1 hold it in a file."""
        return IntegerScheme(2, self.group_size, True)

    @property
    def label(self) -> str:
        """A short name, e.g. ``ternary g64 optimal``."""
        return f"ternary {self.carrier.span} {self.rule}"


Scheme = IntegerScheme | FloatScheme | MxScheme | Nvfp4Scheme | Nf4Scheme | TernaryScheme
