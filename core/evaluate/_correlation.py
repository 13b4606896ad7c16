"""Rank and linear correlation of two models' similarities with people's scores, with intervals over pairs.

Legend: N pairs, R draws.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from core.evaluate._intervals import Bootstrap, Floats, Interval
from core.types import Metric

Correlation = Callable[[Floats, Floats], Floats]
"""[R] of each row of two arrays [R, N]."""


def spearman(first_RN: Floats, second_RN: Floats) -> Floats:
    """[R] rank correlation of each row of two arrays [R, N]; NaN where a row is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(first_RN, axis=1), rankdata(second_RN, axis=1))


def pearson(first_RN: Floats, second_RN: Floats) -> Floats:
    """[R] linear correlation of each row of two arrays [R, N]; NaN where a row is constant."""
    first_RN = first_RN - first_RN.mean(1, keepdims=True)
    second_RN = second_RN - second_RN.mean(1, keepdims=True)
    scale_R = np.sqrt((first_RN**2).sum(1) * (second_RN**2).sum(1))
    with np.errstate(invalid="ignore"):
        correlation_R: Floats = (first_RN * second_RN).sum(1) / scale_R
    return correlation_R


def correlation_metrics(
    name: str,
    correlation: Correlation,
    gold_N: Floats,
    base_N: Floats,
    variant_N: Floats,
    bootstrap: Bootstrap,
    *,
    same: bool,
) -> tuple[Metric, ...]:
    """``name`` of the variant, of the base, and their difference; pairs resampled, both models on the same draws."""

    def of(counts_RD: NDArray[np.int64], values_N: Floats) -> Floats:
        rows, n = counts_RD.shape
        drawn_RN = np.repeat(np.tile(np.arange(n), rows), counts_RD.ravel()).reshape(rows, n)
        return correlation(gold_N[drawn_RN], values_N[drawn_RN])

    def metric(name: str, value: float, interval: Interval) -> Metric:
        how = interval.how
        return Metric(name, value, "correlation", "higher", len(gold_N), interval.low, interval.high, how)

    base, variant = (float(correlation(gold_N[None], values[None])[0]) for values in (base_N, variant_N))
    difference = bootstrap.of(lambda counts_RD: of(counts_RD, variant_N) - of(counts_RD, base_N))
    if same:
        difference = Interval.exact(0.0, "the variant is the base itself")
    return (
        metric(name, variant, bootstrap.of(lambda counts_RD: of(counts_RD, variant_N))),
        metric(f"{name}_base", base, bootstrap.of(lambda counts_RD: of(counts_RD, base_N))),
        metric(f"delta_{name}", variant - base, difference),
    )
