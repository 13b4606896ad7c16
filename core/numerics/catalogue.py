"""Every number format as a reader meets it: its bits, its values, what it makes of a number. Torch-free.

The rounding is that of the torch code beside it, once more in numpy and float64 (a test holds the two together), so
that a page can answer without a model and without torch. A block is K values that share a scale; formats without a
scale take each value on its own.

Legend: ``N`` blocks, ``K`` values of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from core.numerics.minifloat import E2M1, E4M3, FLOAT16, FLOAT32, MINIFLOATS, Floats, Minifloat, nearest_codes
from core.numerics.nf4 import CODEBOOK
from core.numerics.schemes import ScaleRule

Family = Literal["float", "block float", "integer", "codebook"]
Field = Literal["sign", "exponent", "mantissa", "code"]
BLOCK = 32
"""Values that share a scale where the format leaves it open."""
SAMPLE = 1 << 16
"""Values that a distribution's SQNR is measured on, with a fixed seed: ± 0.03 dB."""


@dataclass(frozen=True)
class NumberFormat:
    """One format: an element (a float, an integer or a codebook's entry) and what scales a block of them."""

    id: str
    title: str
    family: Family
    bits: int
    """Of one value."""
    element: Minifloat | None
    """None: an integer or a codebook's entry."""
    points: tuple[float, ...] = ()
    """The values of an integer grid or a codebook, ascending, before scaling."""
    block: int | None = None
    """Values that share a scale; None: there is none."""
    scale_bits: int = 0
    """Bits of a block's scale."""
    scale: str = ""
    """What the scale is, in words."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of a value and its share of the scale."""
        return self.bits + (self.scale_bits / self.block if self.block else 0.0)

    def grid(self) -> Floats:
        """Every value before scaling, ascending; for formats of up to 16 bits."""
        return self.element.values() if self.element else np.array(self.points)

    @property
    def largest(self) -> float:
        """The largest value before scaling."""
        return self.element.largest if self.element else self.points[-1]

    @property
    def smallest(self) -> float:
        """The smallest positive value before scaling."""
        return self.element.smallest if self.element else min(p for p in self.points if p > 0)

    @property
    def dynamic_range_db(self) -> float:
        """20 · log10(largest magnitude / smallest positive), within one block."""
        reach = self.element.largest if self.element else max(abs(p) for p in self.points)
        return 20 * math.log10(reach / self.smallest)


def _float(element: Minifloat, title: str) -> NumberFormat:
    return NumberFormat(element.name, title, "float", element.bits, element)


def _mx(element: str, title: str) -> NumberFormat:
    one = MINIFLOATS[element]
    id_ = f"mxfp{one.bits}" + ("" if one.bits == 4 else f"_{element}")
    return NumberFormat(
        id_, title, "block float", one.bits, one, (), 32, 8, "a power of two (E8M0) for 32 values"
    )


def _integer(bits: int) -> NumberFormat:
    points = tuple(float(code) for code in range(-(1 << bits - 1), 1 << bits - 1))
    words = f"a float16 for a group of {BLOCK} values"
    return NumberFormat(f"int{bits}", f"int{bits}", "integer", bits, None, points, BLOCK, 16, words)


FORMATS: dict[str, NumberFormat] = {
    one.id: one
    for one in (
        *(_float(MINIFLOATS[name], name) for name in ("float32", "bfloat16", "float16")),
        _float(MINIFLOATS["e4m3"], "float8 e4m3"),
        _float(MINIFLOATS["e5m2"], "float8 e5m2"),
        _integer(8),
        _mx("e4m3", "MXFP8 e4m3"),
        _mx("e5m2", "MXFP8 e5m2"),
        _mx("e2m3", "MXFP6 e2m3"),
        _mx("e3m2", "MXFP6 e3m2"),
        *(_integer(bits) for bits in (6, 5, 4)),
        _mx("e2m1", "MXFP4"),
        NumberFormat(
            "nvfp4", "NVFP4", "block float", 4, E2M1, (), 16, 8,
            "a float8 (e4m3) for 16 values, and one float32 for the matrix",
        ),
        NumberFormat("nf4", "NF4", "codebook", 4, None, CODEBOOK, 64, 32, "a float32 for 64 values"),
        *(_integer(bits) for bits in (3, 2)),
        NumberFormat(
            "ternary", "ternary", "codebook", 2, None, (-1.0, 0.0, 1.0), BLOCK, 16,
            f"a float16 for a group of {BLOCK} values, fitted to all of them",
        ),
    )
}  # fmt: skip
"""By id, widest first."""
GGUF_BLOCKS: dict[str, tuple[int, int]] = {
    "Q8_0": (32, 34), "Q5_0": (32, 22), "Q4_1": (32, 20), "Q4_0": (32, 18), "MXFP4": (32, 17),
    "Q6_K": (256, 210), "Q4_K": (256, 144), "Q2_K": (256, 84),
}  # fmt: skip
"""GGUF's types: values of a block, and bytes of a block."""


# --- rounding -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """Blocks after a round trip through a format."""

    values_NK: Floats
    scale_N1: Floats
    clipped_NK: np.ndarray
    """Beyond the last value of the grid, by more than half a step."""


def round_blocks(values_NK: Floats, format_: NumberFormat, *, rule: ScaleRule = "even") -> Rounded:
    """Every block stored in a format and read back; ``rule`` is for microscaling formats."""
    scale_N1 = _scales(values_NK, format_, rule)
    scaled_NK = values_NK / scale_N1
    if format_.element is not None:
        rounded_NK = format_.element.round(scaled_NK)
        beyond = format_.largest + format_.element.spacing(format_.largest) / 2
        return Rounded(rounded_NK * scale_N1, scale_N1, np.abs(scaled_NK) > beyond)
    points = np.array(format_.points)
    if format_.family == "integer":
        rounded_NK = np.clip(np.rint(scaled_NK), points[0], points[-1])
        # The symmetric grid's extreme is meant to lie half a step beyond its last code.
        clipped_NK = np.maximum(scaled_NK - points[-1], points[0] - scaled_NK) > 0.5 + 1e-3
        return Rounded(rounded_NK * scale_N1, scale_N1, clipped_NK)
    rounded_NK = points[nearest_codes(scaled_NK, points)]
    return Rounded(rounded_NK * scale_N1, scale_N1, np.abs(scaled_NK) > 1.5)


def _scales(values_NK: Floats, format_: NumberFormat, rule: ScaleRule) -> Floats:
    largest_N1: Floats = np.abs(values_NK).max(-1, keepdims=True)
    if format_.block is None:
        return np.ones_like(largest_N1)
    if format_.id.startswith("mxfp"):
        assert format_.element is not None
        return np.asarray(np.ldexp(1.0, shared_exponent(largest_N1, format_.element, rule)))
    if format_.id == "nvfp4":
        whole = E4M3.largest * E2M1.largest / max(float(largest_N1.max()), FLOAT32.smallest_normal)
        stored_N1 = E4M3.round(whole * largest_N1 / E2M1.largest)
        return np.where(stored_N1 == 0, 0.125, stored_N1) / whole
    if format_.id == "nf4":
        return np.where(largest_N1 == 0, 1.0, largest_N1)
    if format_.id == "ternary":
        return _stored(_ternary_scale(np.abs(values_NK)))
    return _stored(largest_N1 / ((2**format_.bits - 1) / 2))


def _stored(scale_N1: Floats) -> Floats:
    """Scales as float16 keeps them, float32 where one is no normal number of it."""
    scale_N1 = np.where(scale_N1 == 0, 1.0, scale_N1)
    fits = scale_N1.min() >= FLOAT16.smallest_normal and scale_N1.max() * 256 <= FLOAT16.largest
    return (FLOAT16 if fits else FLOAT32).round(scale_N1)


def _ternary_scale(magnitude_NK: Floats) -> Floats:
    """The least squares scale: the mean of the k largest magnitudes for the k with the largest (sum)² / k."""
    ordered_NK = -np.sort(-magnitude_NK, axis=-1)
    count_K = np.arange(1, ordered_NK.shape[-1] + 1)
    mean_NK = ordered_NK.cumsum(-1) / count_K
    best_N1 = (mean_NK**2 * count_K).argmax(-1)[:, None]
    return np.take_along_axis(mean_NK, best_N1, -1)


def shared_exponent(largest_N1: Floats, element: Minifloat, rule: ScaleRule) -> np.ndarray:
    """Exponent of a microscaling block's power of two from its largest magnitude; ``core.numerics.mx`` has the rules."""
    mantissa, exponent = np.frexp(np.asarray(largest_N1, dtype=float))  # 0.5 ≤ mantissa < 1
    exponent = exponent - 1 - element.largest_exponent
    if rule == "ceil":
        exponent = exponent + (2 * mantissa > element.largest / 2.0**element.largest_exponent)
    if rule == "even":
        exponent = exponent + (2 * mantissa + 2.0 ** -(element.mantissa_bits + 1) >= 2)
    return np.where(np.asarray(largest_N1) == 0, -127, np.clip(exponent, -127, 127)).astype(int)


# --- one number ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """What a format keeps of one number."""

    value: float
    """Read back; beyond the largest value, the largest."""
    scale: float
    parts: tuple[tuple[Field, str], ...]
    """Its bits, cut into fields."""
    spacing: float
    """Distance of neighbouring values around it."""
    clipped: bool
    """Beyond the largest value."""


def store(value: float, format_: NumberFormat, *, largest: float, rule: ScaleRule = "even") -> Stored:
    """Store a number whose block's largest magnitude is ``largest`` (at least the number's own)."""
    block = np.array([[value, max(largest, abs(value))]])
    rounded = round_blocks(block, format_, rule=rule)
    scale = float(rounded.scale_N1[0, 0])
    clipped = bool(rounded.clipped_NK[0, 0])
    if format_.element is not None:
        element = format_.element
        code = int(element.encode(value / scale))
        sign, exponent, mantissa = element.fields(code)
        parts: tuple[tuple[Field, str], ...] = (
            ("sign", str(sign)),
            ("exponent", f"{exponent:0{element.exponent_bits}b}"),
            ("mantissa", f"{mantissa:0{element.mantissa_bits}b}"),
        )
        return Stored(
            float(rounded.values_NK[0, 0]), scale, parts, element.spacing(value / scale) * scale, clipped
        )
    points = np.array(format_.points)
    index = int(nearest_codes(rounded.values_NK[0, 0] / scale, points))
    steps = np.diff(points)
    spacing = float(steps[min(max(index - (value / scale < points[index]), 0), len(steps) - 1)]) * scale
    if format_.family == "integer" or format_.id == "ternary":  # two's complement
        code = int(points[index]) & ((1 << format_.bits) - 1)
        bits = f"{code:0{format_.bits}b}"
        parts = (("sign", bits[0]), ("code", bits[1:]))
    else:
        parts = (("code", f"{index:0{format_.bits}b}"),)
    return Stored(float(rounded.values_NK[0, 0]), scale, parts, spacing, clipped)


# --- known distributions ------------------------------------------------------------------------------

Distribution = Literal["gaussian", "uniform"]
_DRAWN: dict[Distribution, Callable[[np.random.Generator], Floats]] = {
    "gaussian": lambda random: random.standard_normal(SAMPLE),
    "uniform": lambda random: random.uniform(-1, 1, SAMPLE),
}


@cache
def sqnr_db(format_: NumberFormat, distribution: Distribution, rule: ScaleRule = "even") -> float:
    """Signal to quantization noise of a distribution of width 1 in a format with its own blocks, in dB.

    10 · log10(Σ x² / Σ (x - x̂)²) over a seeded sample. A uniform distribution that fills b bits has
    20 · log10(2^b - 1) dB, about 6.02 · b.
    """
    values = _DRAWN[distribution](np.random.default_rng(0))
    blocks_NK = values.reshape(-1, format_.block or BLOCK)
    noise = blocks_NK - round_blocks(blocks_NK, format_, rule=rule).values_NK
    power = float((noise**2).sum())
    return 10 * math.log10(float((blocks_NK**2).sum()) / power) if power else math.inf
