"""The quadrature on functions whose integral is known; no model."""

from __future__ import annotations

import numpy as np
import pytest

from core.probes._path_integral import adaptive, gauss_legendre


class Curve:
    """f on the path, and two positions that share its slope three to one."""

    def __init__(self, f: object, slope: object) -> None:
        self._f, self._slope = f, slope
        self.evaluated = 0

    def value(self, alpha_S: np.ndarray) -> np.ndarray:
        return self._f(alpha_S)  # type: ignore[operator]

    def evaluate(self, alpha_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.evaluated += len(alpha_S)
        slope_S = self._slope(alpha_S)  # type: ignore[operator]
        return self.value(alpha_S), np.stack([0.75 * slope_S, 0.25 * slope_S], axis=1)


def power(degree: int) -> Curve:
    return Curve(lambda a: a**degree, lambda a: degree * a ** (degree - 1))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_n_points_are_exact_up_to_a_slope_of_degree_2n_minus_1(steps: int) -> None:
    exact = power(2 * steps)
    found = gauss_legendre(exact.evaluate, exact.value, steps)
    assert found.value_P == pytest.approx([0.75, 0.25], abs=1e-14)
    assert (found.delta, found.steps) == (1, steps)
    beyond = power(2 * steps + 1)
    assert abs(gauss_legendre(beyond.evaluate, beyond.value, steps).gap) > 1e-7


def test_a_quadratic_needs_one_midpoint() -> None:
    curve = power(2)
    assert gauss_legendre(curve.evaluate, curve.value, 1).gap == pytest.approx(0, abs=1e-15)


def spike(width: float) -> Curve:
    """A rise of height 1 in a short part of the path, as a norm near zero makes it."""
    return Curve(
        lambda a: np.tanh((a - 0.3) / width),
        lambda a: (1 - np.tanh((a - 0.3) / width) ** 2) / width,
    )


def test_splitting_finds_a_spike_that_one_rule_misses() -> None:
    width = 1e-3
    plain = spike(width)
    assert gauss_legendre(plain.evaluate, plain.value, 100).relative > 0.05
    curve = spike(width)
    found = adaptive(curve.evaluate, curve.value, steps=200, tolerance=0.01)
    assert found.relative < 0.01
    assert found.value_P == pytest.approx(np.array([0.75, 0.25]) * found.delta, rel=0.01)
    assert found.steps == curve.evaluated <= 200
    assert (np.diff(found.alpha_S) >= 0).all()
    assert found.f_S == pytest.approx(curve.value(found.alpha_S))


def test_errors_that_cancel_are_still_seen() -> None:
    """One full wave misses as much on the way up as on the way down: the sum is right, its parts are not."""
    curve = Curve(lambda a: np.sin(2000 * a) + a, lambda a: 2000 * np.cos(2000 * a) + 1)
    found = adaptive(curve.evaluate, curve.value, steps=64, tolerance=0.01)
    assert found.missed_by_segments > abs(found.gap)
    assert found.relative > 0.05


def test_the_budget_is_kept_and_a_smooth_path_stops_early() -> None:
    rough = Curve(lambda a: np.sin(5000 * a), lambda a: 5000 * np.cos(5000 * a))
    assert adaptive(rough.evaluate, rough.value, steps=50, tolerance=0.01).steps <= 50
    few = power(3)
    assert adaptive(few.evaluate, few.value, steps=4, tolerance=0.01).steps == 4
    smooth = power(3)
    assert adaptive(smooth.evaluate, smooth.value, steps=1000, tolerance=0.01).steps == 16


def test_no_difference_gives_no_number_that_is_not_one() -> None:
    flat = Curve(lambda a: 0 * a, lambda a: 0 * a)
    found = adaptive(flat.evaluate, flat.value, steps=32, tolerance=0.01)
    assert (found.gap, found.relative, found.steps) == (0, 0, 16)
    bump = Curve(lambda a: a * (1 - a) * np.sin(900 * a), lambda a: 900 * np.cos(900 * a))
    assert adaptive(bump.evaluate, bump.value, steps=16, tolerance=0.01).relative > 1
