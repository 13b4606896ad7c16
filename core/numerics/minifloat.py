"""Binary floating point of any width as plain numbers: its fields, its values, its rounding. Torch-free.

A number is (-1)^sign · 2^(exponent - bias) · 1.mantissa; at exponent field 0 it is subnormal,
(-1)^sign · 2^(1 - bias) · 0.mantissa. Sources: IEEE 754-2019; OCP 8-bit Floating Point Specification (e4m3, e5m2);
OCP Microscaling Formats Specification v1.0 (e2m1, e2m3, e3m2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Specials = Literal["ieee", "nan", "none"]
"""What the largest exponent means: infinities and NaN; ordinary numbers but for one NaN; ordinary numbers."""


@dataclass(frozen=True)
class Minifloat:
    """One format: how many bits its fields have, and what its last exponent means."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    specials: Specials

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent field."""
        return int(2 ** (self.exponent_bits - 1) - 1)

    @property
    def largest_code(self) -> int:
        """The code of the largest finite number."""
        last = (1 << (self.bits - 1)) - 1
        return {"none": last, "nan": last - 1, "ieee": last - (1 << self.mantissa_bits)}[self.specials]

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return float(self.decode(self.largest_code))

    @property
    def smallest_normal(self) -> float:
        """Below it the spacing stays what it is here: numbers lose digits."""
        return float(2.0 ** (1 - self.bias))

    @property
    def smallest(self) -> float:
        """The smallest positive number (subnormal)."""
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))

    @property
    def largest_exponent(self) -> int:
        """⌊log2 of the largest finite number⌋."""
        return math.frexp(self.largest)[1] - 1

    @property
    def dynamic_range_db(self) -> float:
        """20 · log10(largest / smallest positive)."""
        return 20 * math.log10(self.largest / self.smallest)

    def decode(self, codes: ArrayLike) -> Floats:
        """The numbers that codes mean, in float64; infinities and NaN included."""
        code = np.asarray(codes, dtype=np.int64)
        sign = np.where(code >> (self.bits - 1) & 1, -1.0, 1.0)
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        exponent = magnitude >> self.mantissa_bits
        mantissa = magnitude & ((1 << self.mantissa_bits) - 1)
        significand = np.where(exponent > 0, mantissa + (1 << self.mantissa_bits), mantissa)
        value = np.ldexp(significand.astype(float), np.maximum(exponent, 1) - self.bias - self.mantissa_bits)
        first_special = self.largest_code + 1
        infinite = (magnitude == first_special) & (self.specials == "ieee")
        value = np.where(magnitude >= first_special, np.where(infinite, np.inf, np.nan), value)
        return np.asarray(sign * value)

    def encode(self, values: ArrayLike) -> NDArray[np.int64]:
        """Codes of the nearest numbers, ties to the even mantissa; beyond the largest the largest is taken."""
        value = np.asarray(values, dtype=float)
        magnitude = np.minimum(np.abs(value), self.largest)
        # frexp gives 0 the exponent of 1/2.
        least = 1 - self.bias
        exponent = np.where(magnitude > 0, np.maximum(np.frexp(magnitude)[1] - 1, least), least)
        steps = np.rint(np.ldexp(magnitude, self.mantissa_bits - exponent)).astype(np.int64)
        # The exponent field starts at 1 for normal numbers, whose significand brings that 1 itself (2^mantissa_bits).
        code = (exponent - 1 + self.bias << self.mantissa_bits) + steps
        return np.asarray(np.where(np.signbit(value), 1 << (self.bits - 1), 0) | code)

    def round(self, values: ArrayLike) -> Floats:
        """The nearest numbers of the format, in float64."""
        return self.decode(self.encode(values))

    def spacing(self, value: float) -> float:
        """Distance of neighbouring numbers around ``value`` (one unit in the last place)."""
        magnitude = min(max(abs(value), self.smallest_normal), self.largest)
        return float(2.0 ** (math.frexp(magnitude)[1] - 1 - self.mantissa_bits))

    def values(self) -> Floats:
        """Every finite number in ascending order, zero once; for formats of up to 16 bits."""
        assert self.bits <= 16, f"{self.name} has 2^{self.bits} codes"
        positive = self.decode(np.arange(1, self.largest_code + 1))
        return np.concatenate([-positive[::-1], [0.0], positive])

    def fields(self, code: int) -> tuple[int, int, int]:
        """Sign, exponent field and mantissa field of a code."""
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = code >> self.mantissa_bits & ((1 << self.exponent_bits) - 1)
        return code >> (self.bits - 1) & 1, exponent, mantissa


FLOAT32 = Minifloat("float32", 8, 23, "ieee")
FLOAT16 = Minifloat("float16", 5, 10, "ieee")
BFLOAT16 = Minifloat("bfloat16", 8, 7, "ieee")
E5M2 = Minifloat("e5m2", 5, 2, "ieee")
E4M3 = Minifloat("e4m3", 4, 3, "nan")
E3M2 = Minifloat("e3m2", 3, 2, "none")
E2M3 = Minifloat("e2m3", 2, 3, "none")
E2M1 = Minifloat("e2m1", 2, 1, "none")
MINIFLOATS: dict[str, Minifloat] = {
    one.name: one for one in (FLOAT32, BFLOAT16, FLOAT16, E4M3, E5M2, E2M3, E3M2, E2M1)
}
"""Every float that a weight is stored as, widest first."""


def nearest_codes(values: Any, grid: Floats) -> NDArray[np.int64]:
    """Index of the nearest point of an ascending grid; a value half-way between two takes the upper index."""
    middles = (grid[1:] + grid[:-1]) / 2
    return np.searchsorted(middles, np.asarray(values, dtype=float), side="right")
