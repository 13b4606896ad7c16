"""Grids fitted to one group of weights at a time, in plain loops over numbers."""

from __future__ import annotations

import math

import numpy as np


def rounded(values: list[float], scale: float, zero: float, bits: int) -> list[float]:
    """Codes of every value, ties to even."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return [float(np.rint(min(max(value / scale + zero, low), high))) for value in values]


def power_error(values: list[float], scale: float, zero: float, bits: int, p: float) -> float:
    """Σ |w - ŵ|^p."""
    codes = rounded(values, scale, zero, bits)
    return sum(abs(v - (c - zero) * scale) ** p for v, c in zip(values, codes, strict=True))


def half_quadratic(
    values: list[float], scale: float, zero: float, *, bits: int, p: float, beta: float, kappa: float, iterations: int
) -> tuple[float, float]:  # fmt: skip
    """HQQ with a whole zero point and a refitted scale stored in float16, for one group."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best = power_error(values, scale, zero, bits, p)
    for _ in range(iterations):
        codes = rounded(values, scale, zero, bits)
        targets = []
        for value, code in zip(values, codes, strict=True):
            step = (value - (code - zero) * scale) / scale
            kept = 0.0 if step == 0 else max(abs(step) - abs(step) ** (p - 1) / beta, 0.0)
            targets.append(value - math.copysign(kept, step) * scale)
        n = len(values)
        code_mean, target_mean = sum(codes) / n, sum(targets) / n
        spread = sum((c - code_mean) ** 2 for c in codes)
        if spread == 0:
            return scale, zero
        slope = sum((c - code_mean) * t for c, t in zip(codes, targets, strict=True)) / spread
        new_zero = float(np.rint(min(max(code_mean - target_mean / slope, low), high))) if slope > 0 else zero
        steps = [c - new_zero for c in codes]
        new_scale = float(
            np.float16(sum(s * t for s, t in zip(steps, targets, strict=True)) / sum(s * s for s in steps))
        )
        error = power_error(values, new_scale, new_zero, bits, p) if new_scale > 0 else math.inf
        if error < best:
            scale, zero, best = new_scale, new_zero, error
        beta *= kappa
    return scale, zero
