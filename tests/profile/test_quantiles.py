"""Order-statistic intervals: textbook ranks, their coverage by definition and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from core.profile.quantiles import (
    early_stopping_bound,
    early_stopping_minimum,
    interval_ranks,
    lag1_autocorrelation,
    quantile,
    smallest_n,
)
from tests.references.slow_statistics import coverage, tail_below


@pytest.mark.parametrize(
    ("n", "q", "ranks"),
    [
        (30, 0.5, (10, 21)),
        (100, 0.9, (84, 96)),
        (300, 0.99, (293, None)),
        (6, 0.5, (1, 6)),
        (5, 0.5, (None, None)),
    ],
)
def test_known_ranks(n, q, ranks):
    assert interval_ranks(n, q) == ranks


@pytest.mark.parametrize("q", [0.5, 0.9])
@pytest.mark.parametrize("n", [7, 29, 50, 200])
def test_ranks_cover_and_are_the_narrowest_equal_tailed(n, q):
    lower, upper = interval_ranks(n, q)
    if lower is not None and upper is not None:
        assert coverage(n, q, lower, upper) >= 0.95
    if lower is not None:
        assert tail_below(n, q, lower) <= 0.025 < tail_below(n, q, lower + 1)
    if upper is not None:
        assert 1 - tail_below(n, q, upper) <= 0.025 < 1 - tail_below(n, q, upper - 1)


def test_smallest_n_of_each_percentile():
    assert [smallest_n(q) for q in (0.9, 0.99, 0.999)] == [29, 299, 2995]


def test_percentile_is_withheld_until_n_allows_it():
    values = np.random.default_rng(0).permutation(np.arange(1, 30)).astype(float).tolist()
    assert quantile(values[:28], 0.9) is None
    found = quantile(values, 0.9)
    assert found is not None
    assert (found.value, found.high) == (27.0, None)  # 29 samples: no upper bound for a p90


def test_values_at_the_ranks():
    values = np.random.default_rng(1).permutation(np.arange(1, 31)).astype(float).tolist()
    found = quantile(values, 0.5)
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == (15.5, 10.0, 21.0, 30)


def test_interval_covers_the_true_median_of_a_skewed_law_as_often_as_it_says():
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(600):
        found = quantile(random.lognormal(size=40).tolist(), 0.5)
        hits += found.low <= 1.0 <= found.high
    assert 0.93 <= hits / 600 <= 0.99


def test_samples_that_resemble_their_neighbours_count_for_less():
    random = np.random.default_rng(3)
    independent = random.normal(10, 1, 200)
    repeated = np.repeat(independent[:40], 5)  # 200 samples, but only 40 draws
    found = quantile(repeated.tolist(), 0.5)
    assert 15 <= found.effective_n <= 45
    assert quantile(independent.tolist(), 0.5).effective_n == 200
    naive = quantile(random.permutation(repeated).tolist(), 0.5)
    assert found.high - found.low > 1.5 * (naive.high - naive.low)


def test_bounds_of_samples_that_resemble_each_other_are_samples():
    """Ranks of fewer effective samples are stretched to n: rounding must never point past the last one."""
    for n in range(10, 120):
        rising = np.arange(n, dtype=float).tolist()
        slow_wave = np.sin(np.arange(n) / 3).tolist()
        for samples in (rising, slow_wave):
            found = quantile(samples, 0.5)
            bounds = [bound for bound in (found.low, found.high) if bound is not None]
            assert set(bounds) <= set(samples), n
            assert bounds == sorted(bounds), n


def test_autocorrelation_known_answers():
    assert lag1_autocorrelation([1.0] * 20) == 0.0
    assert lag1_autocorrelation(list(range(9))) == 0.0  # too few to tell
    assert lag1_autocorrelation(list(range(100))) > 0.95
    assert lag1_autocorrelation([0.0, 1.0] * 50) < -0.95


def test_no_samples_no_number():
    assert quantile([], 0.5) is None


@pytest.mark.parametrize(
    ("q", "minima"), [(0.9, {1: 64, 2: 81, 5: 127, 10: 197}), (0.99, {1: 662, 2: 838, 5: 1307, 10: 2010})]
)
def test_early_stopping_minima_are_mlperfs(q, minima):
    assert {slow: early_stopping_minimum(q, slow) for slow in minima} == minima
    for slow, n in minima.items():  # by definition: so few slow ones are seen in at most 1 % of such series
        assert tail_below(n, 1 - q, slow + 1) <= 0.01 < tail_below(n - 1, 1 - q, slow + 1)


def test_early_stopping_drops_all_but_one_of_the_slow_ones():
    values = np.random.default_rng(4).permutation(np.arange(1, 128)).astype(float).tolist()
    assert early_stopping_bound(values[:63], 0.9) is None
    assert early_stopping_bound(values, 0.9) == 123.0  # 127 samples may have 5 slow ones: 4 are dropped
    assert early_stopping_bound(sorted(values)[:126], 0.9) == 123.0  # 126 only 4, of a largest value of 126


def test_the_early_stopping_bound_holds_as_often_as_it_says():
    random = np.random.default_rng(5)
    bounds = [early_stopping_bound(random.random(100).tolist(), 0.9) for _ in range(1000)]
    assert sum(bound < 0.9 for bound in bounds) <= 20  # 1 % of 1000, and some luck
