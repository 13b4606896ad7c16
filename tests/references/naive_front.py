"""The Pareto front and sure dominance written as their definitions, O(n²): what core.tradeoff must equal."""

from __future__ import annotations

import math


def naive_front(points: list[tuple[float, float]]) -> list[bool]:
    """Lower is better on both: a point stays if no other is at least as low on both and lower on one."""
    return [
        not math.isnan(x)
        and not math.isnan(y)
        and not any(u <= x and v <= y and (u < x or v < y) for u, v in points)
        for x, y in points
    ]


def naive_surely_dominated(
    boxes: list[tuple[tuple[float, float, float], tuple[float, float, float]]], delta: float
) -> list[bool]:
    """``boxes`` holds (value, low, high) per axis, lower is better; see ``core.tradeoff.surely_dominated``."""

    def beats(a: tuple, b: tuple) -> bool:
        for separated, other in ((0, 1), (1, 0)):
            apart = a[separated][2] < b[separated][1]
            not_worse = a[other][0] <= b[other][0] + delta * abs(b[other][0])
            if apart and not_worse:
                return True
        return False

    return [any(beats(a, b) for a in boxes) for b in boxes]
