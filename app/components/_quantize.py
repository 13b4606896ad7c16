"""Values on their way to a coloured component: 256 levels, and the limits they stand for."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Levels:
    """An array as base64 bytes, one level 0–255 per value; missing values are level 0."""

    encoded: str
    low: float
    high: float
    signature: int
    """Changes when the levels do, so that the browser redraws only then."""


def to_levels(
    values: NDArray[np.floating],
    *,
    midpoint: float | None = None,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> Levels:
    """Quantize to 256 levels, evenly or in the logarithm of positive values.

    With a midpoint the limits are symmetric about it, so that it gets the middle colour. ``limits`` are given where
    several pictures share one scale.
    """
    values = np.asarray(values, dtype=np.float64)
    shape, extra = values.shape, np.asarray(limits if limits is not None else (), dtype=np.float64)
    values = np.concatenate([values.ravel(), extra])
    if log:
        values = np.log(np.where(values > 0, values, np.nan))
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if midpoint is not None:
        reach = max(abs(high - midpoint), abs(low - midpoint))
        low, high = midpoint - reach, midpoint + reach
    span = high - low or 1.0
    levels = np.nan_to_num(np.clip((values - low) / span * 255, 0, 255), nan=0.0).round().astype(np.uint8)
    raw = levels[: levels.size - extra.size].reshape(shape).tobytes()
    limits = (float(np.exp(low)), float(np.exp(high))) if log else (low, high)
    return Levels(base64.b64encode(raw).decode(), *limits, zlib.crc32(raw))
