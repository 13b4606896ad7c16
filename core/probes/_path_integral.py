"""The integral of a gradient along a straight path, and how far it is from adding up.

Legend: S steps (points of the path), P positions, K points of a segment.

A path runs from a baseline x₀ to the input x; the integral of its slope is f(x) − f(x₀) for any smooth f, so what a
quadrature misses is measured, not guessed: on the whole path, and on each of its segments. The adaptive rule splits
the segments that miss most. It knows no model: it is handed a function of points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SEGMENT_POINTS = 4
FIRST_SEGMENTS = 4
Evaluate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From places on the path (α, 0 is the baseline, 1 the input) [S] to f there [S] and each position's share of the
slope df/dα [S, P]."""
Value = Callable[[np.ndarray], np.ndarray]
"""From places on the path [S] to f there [S]; needs no gradient."""


@dataclass(frozen=True)
class Segment:
    """One piece of the path with its own check."""

    start: float
    end: float
    integral_P: np.ndarray
    missed: float
    """Σ integral − what f really gained over the segment."""


@dataclass(frozen=True)
class PathIntegral:
    """Attributions per position, and what is known of their error."""

    value_P: np.ndarray
    delta: float
    """f(x) − f(x₀)."""
    steps: int
    missed_by_segments: float
    """Σ over segments of |what it misses|: errors that cancel in the sum do not cancel here."""
    alpha_S: np.ndarray
    f_S: np.ndarray
    """f along the path, at every point that was visited."""

    @property
    def gap(self) -> float:
        """Σ attributions − (f(x) − f(x₀)): the completeness gap."""
        return float(self.value_P.sum()) - self.delta

    @property
    def relative(self) -> float:
        """The larger of |gap| and what segments miss, as a share of |f(x) − f(x₀)|; infinite where that is 0."""
        missed = max(abs(self.gap), self.missed_by_segments)
        if missed == 0:
            return 0.0
        return missed / abs(self.delta) if self.delta else math.inf


def gauss_legendre(evaluate: Evaluate, value: Value, steps: int) -> PathIntegral:
    """One Gauss–Legendre rule over the whole path: exact for slopes that are polynomials up to degree 2 · steps − 1."""
    ends = value(np.array([0.0, 1.0]))
    alpha_S, weight_S = _rule(0.0, 1.0, steps)
    f_S, slope_SP = evaluate(alpha_S)
    value_P = weight_S @ slope_SP
    delta = float(ends[1] - ends[0])
    missed = abs(float(value_P.sum()) - delta)
    return PathIntegral(
        value_P,
        delta,
        steps,
        missed,
        np.concatenate([[0.0], alpha_S, [1.0]]),
        np.concatenate([ends[:1], f_S, ends[1:]]),
    )


def adaptive(
    evaluate: Evaluate,
    value: Value,
    *,
    steps: int,
    tolerance: float,
    report: Callable[[int], None] = lambda done: None,
) -> PathIntegral:
    """Split the segments that miss most until all together miss less than ``tolerance`` · |Δ|, or ``steps`` are spent."""
    known: dict[float, float] = {}
    visited: list[tuple[np.ndarray, np.ndarray]] = []

    def measure(bounds: list[tuple[float, float]]) -> list[Segment]:
        new = sorted({end for pair in bounds for end in pair} - known.keys())
        if new:
            known.update(zip(new, value(np.array(new)).tolist(), strict=True))
        rules = [_rule(start, end, SEGMENT_POINTS) for start, end in bounds]
        alpha_S = np.concatenate([alpha for alpha, _ in rules])
        f_S, slope_SP = evaluate(alpha_S)
        visited.append((alpha_S, f_S))
        found = []
        slope_BKP = slope_SP.reshape(len(bounds), SEGMENT_POINTS, -1)
        for (start, end), (_, weight_K), slope_KP in zip(bounds, rules, slope_BKP, strict=True):
            integral_P = weight_K @ slope_KP
            missed = float(integral_P.sum()) - (known[end] - known[start])
            found.append(Segment(start, end, integral_P, missed))
        return found

    first = max(1, min(FIRST_SEGMENTS, steps // SEGMENT_POINTS))
    segments = measure(list(itertools.pairwise(np.linspace(0, 1, first + 1).tolist())))
    spent = first * SEGMENT_POINTS
    delta = known[1.0] - known[0.0]
    while True:
        report(spent)
        missed = sum(abs(segment.missed) for segment in segments)
        affordable = (steps - spent) // (2 * SEGMENT_POINTS)
        if missed <= tolerance * abs(delta) or affordable < 1:
            break
        segments.sort(key=lambda segment: -abs(segment.missed))
        split = [s for s in segments if abs(s.missed) > tolerance * abs(delta) / len(segments)][:affordable]
        halves = [half for s in split for half in _halves(s)]
        segments = [*segments[len(split) :], *measure(halves)]
        spent += len(halves) * SEGMENT_POINTS
    alpha_S = np.concatenate([np.array(list(known)), *(alpha for alpha, _ in visited)])
    f_S = np.concatenate([np.array(list(known.values())), *(f for _, f in visited)])
    order = np.argsort(alpha_S)
    value_P = np.sum([segment.integral_P for segment in segments], axis=0)
    return PathIntegral(value_P, delta, spent, missed, alpha_S[order], f_S[order])


def _rule(start: float, end: float, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre points and weights on [start, end]."""
    x, weight = np.polynomial.legendre.leggauss(points)
    return start + (end - start) * (x + 1) / 2, weight * (end - start) / 2


def _halves(segment: Segment) -> tuple[tuple[float, float], tuple[float, float]]:
    middle = (segment.start + segment.end) / 2
    return (segment.start, middle), (middle, segment.end)
