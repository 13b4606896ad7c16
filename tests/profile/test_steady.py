"""Steady-state detection on series whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from core.profile.steady import SteadyRule, is_steady, relative_drift, trend_p_value
from tests.references.slow_statistics import mann_kendall_exact_p, theil_sen_slope

RULE = SteadyRule(window=10, tolerance=0.02)


def noise(n: int, seed: int = 0, scale: float = 0.005) -> np.ndarray:
    return 1 + np.random.default_rng(seed).normal(0, scale, n)


def first_steady(values: np.ndarray) -> int | None:
    """Iterations seen when the detector, asked after each window, first says yes."""
    for n in range(RULE.window, len(values) + 1, RULE.window):
        if is_steady(values[:n].tolist(), RULE):
            return n
    return None


def test_constant_is_steady_as_soon_as_it_can_be_known():
    assert first_steady(np.ones(100)) == RULE.smallest_n == 40


def test_noise_about_a_constant_is_steady():
    assert all(first_steady(noise(100, seed)) for seed in range(20))


def test_warm_up_is_waited_out():
    decaying = 1 + 2 * np.exp(-np.arange(200) / 20)
    found = first_steady(decaying * noise(200))
    # At iteration 80 the first of four windows still runs 2 % slower than the next one.
    assert found is not None
    assert 100 <= found <= 160


def test_a_step_in_the_middle_starts_the_wait_again():
    series = np.concatenate([np.full(35, 2.0), np.full(65, 1.0)]) * noise(100)
    assert first_steady(series) >= 70


def test_throttling_never_is_steady():
    assert first_steady(np.linspace(1, 3, 200) * noise(200)) is None


def test_slow_drift_under_the_window_tolerance_is_caught_by_the_trend():
    drifting = np.linspace(1, 1.05, 40) * noise(40, scale=0.001)
    medians = np.median(drifting.reshape(4, 10), axis=1)
    assert np.all(np.abs(medians[1:] / medians[:-1] - 1) < RULE.tolerance)
    assert not is_steady(drifting.tolist(), RULE)


def test_a_real_but_immaterial_trend_does_not_hold_it_up():
    drifting = np.linspace(1, 1.001, 40)
    assert trend_p_value(drifting) < 0.001
    assert is_steady(drifting.tolist(), RULE)


def test_two_alternating_states_are_not_called_steady():
    blocks = np.concatenate([np.full(10, 1.0 + 0.1 * (i % 2)) for i in range(20)])
    assert first_steady(blocks) is None


@pytest.mark.parametrize("seed", range(5))
def test_trend_agrees_with_the_count_over_all_orders(seed):
    values = np.random.default_rng(seed).normal(size=6).tolist()
    assert trend_p_value(values) == pytest.approx(mann_kendall_exact_p(values), abs=1e-9)


def test_drift_agrees_with_the_median_of_all_slopes():
    values = (np.linspace(1, 2, 15) * noise(15)).tolist()
    assert relative_drift(values) == pytest.approx(abs(theil_sen_slope(values)) * 14 / np.median(values))
