"""Slow and obvious versions of the statistics of ``core.profile``, straight from their definitions."""

from __future__ import annotations

import itertools
import math


def coverage(n: int, q: float, lower: int, upper: int) -> float:
    """P(x_(lower) ≤ q-quantile ≤ x_(upper)) of n independent samples: between lower and upper − 1 lie below."""
    return sum(math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(lower, upper))


def tail_below(n: int, q: float, lower: int) -> float:
    """P(the q-quantile lies under x_(lower)): fewer than ``lower`` samples lie below it."""
    return sum(math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(lower))


def mann_kendall_exact_p(values: list[float]) -> float:
    """Share of all orders of the values whose |S| is at least as large; S counts rising less falling pairs."""

    def score(order: tuple[float, ...]) -> int:
        return sum((b > a) - (b < a) for a, b in itertools.combinations(order, 2))

    seen = abs(score(tuple(values)))
    orders = list(itertools.permutations(values))
    return sum(abs(score(order)) >= seen for order in orders) / len(orders)


def theil_sen_slope(values: list[float]) -> float:
    """Median of the slopes of all pairs."""
    slopes = sorted(
        (values[j] - values[i]) / (j - i) for i, j in itertools.combinations(range(len(values)), 2)
    )
    middle = len(slopes) // 2
    return slopes[middle] if len(slopes) % 2 else (slopes[middle - 1] + slopes[middle]) / 2
