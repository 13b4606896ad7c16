"""Intervals: known values, the slow bootstrap, and how often the truth is really inside."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from core.evaluate._intervals import MIN_DOCUMENTS, Bootstrap, _tail, wilson
from tests.references.resampling import resampled, spread


class TestWilson:
    @pytest.mark.parametrize(
        ("hits", "trials"), [(0, 10), (5, 10), (81, 263), (15, 148), (8000, 8000), (1, 3)]
    )
    def test_equals_scipy(self, hits: int, trials: int):
        expected = stats.binomtest(hits, trials).proportion_ci(method="wilson")
        assert wilson(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_the_share_is_inside_at_both_ends(self):
        for trials in range(1, 200):
            assert wilson(trials, trials)[1] == 1
            assert wilson(0, trials)[0] == 0

    def test_published_value(self):
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263
        assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


class TestBootstrap:
    documents = np.random.default_rng(3).gamma(2.0, size=(20, 2)) * [1.0, 4.0] + 0.1

    def test_draws_have_the_same_spread_as_the_slow_bootstrap(self):
        numerator, denominator = self.documents.T
        seen: list[np.ndarray] = []
        bootstrap = Bootstrap(20, draws=20_000, seed=0)
        bootstrap.of(lambda counts: seen.append(counts @ numerator / (counts @ denominator)) or seen[-1])
        slow = resampled(
            list(map(tuple, self.documents)),
            lambda some: sum(d[0] for d in some) / sum(d[1] for d in some),  # type: ignore[index]
            draws=20_000,
            seed=1,
        )
        fast = np.concatenate(seen)
        assert len(fast) == 20_000
        assert spread(fast.tolist()) == pytest.approx(spread(slow), rel=0.03)

    def test_same_seed_same_interval(self):
        intervals = [Bootstrap(20, draws=500, seed=s).ratio(*self.documents.T) for s in (0, 0, 1)]
        assert intervals[0] == intervals[1] != intervals[2]

    def test_pairing_removes_what_both_models_share(self):
        hard = self.documents[:, 0] * 10
        better, worse = hard, hard + 0.01
        ones = np.ones(20)
        bootstrap = Bootstrap(20, draws=500, seed=0)
        difference = bootstrap.ratio(worse - better, ones)
        assert (difference.low, difference.high) == pytest.approx((0.01, 0.01))
        alone = bootstrap.ratio(worse, ones)
        assert alone.high - alone.low > 5  # type: ignore[operator]

    def test_quantile_weights_documents_as_repeating_them_would(self):
        generator = np.random.default_rng(0)
        owner = np.repeat(np.arange(10), 30)
        values = generator.normal(size=300) + owner
        bootstrap = Bootstrap(10, draws=500, seed=0)
        seen: list[np.ndarray] = []
        interval = bootstrap.quantile(values, owner, 0.99)
        for counts in bootstrap.counts_RD:
            repeated = np.concatenate([np.tile(values[owner == d], c) for d, c in enumerate(counts)])
            seen.append(np.quantile(repeated, 0.99, method="inverted_cdf"))
        assert (interval.low, interval.high) == tuple(np.quantile(seen, [_tail(10), 1 - _tail(10)]))

    def test_expansion_is_that_of_student_and_vanishes_with_many_documents(self):
        expected = stats.norm.cdf(np.sqrt(10 / 9) * stats.t.ppf(0.025, 9))
        assert _tail(10) == pytest.approx(expected, abs=1e-12)
        assert _tail(10) < 0.01 < _tail(100_000) == pytest.approx(0.025, abs=1e-4)

    def test_a_share_of_nothing_or_everything_is_not_certain(self):
        tokens = np.full(20, 100.0)
        bootstrap = Bootstrap(20, draws=500, seed=0)
        all_of_them, none = bootstrap.share(tokens, tokens), bootstrap.share(0 * tokens, tokens)
        assert (all_of_them.low, all_of_them.high) == wilson(2000, 2000)
        assert (none.low, none.high) == wilson(0, 2000)
        assert none.high == pytest.approx(3.84 / 2004, rel=1e-2)
        assert "Wilson" in none.how
        assert (
            "bootstrap over 20 documents" in bootstrap.share(tokens * self.documents[:, 0] % 50, tokens).how
        )

    def test_too_few_documents_give_no_interval(self):
        few = Bootstrap(MIN_DOCUMENTS - 1, draws=500, seed=0).ratio(np.ones(7), np.ones(7))
        assert (few.low, few.high, few.how) == (None, None, "")


@pytest.mark.parametrize("skew", ["symmetric", "skewed"])
def test_the_truth_is_inside_about_as_often_as_promised(skew: str):
    """600 evaluations of 24 documents of unequal length; the plain percentile interval is also tried.

    Seen: symmetric 0.950 (plain 0.920), skewed 0.922 (plain 0.907).
    """
    generator = np.random.default_rng(7)
    inside = plain_inside = 0
    trials, true_mean = 600, 1.0
    for trial in range(trials):
        tokens = generator.integers(50, 400, size=24).astype(float)
        if skew == "symmetric":
            means = true_mean + 0.3 * generator.normal(size=24)
        else:
            means = generator.gamma(4.0, true_mean / 4.0, size=24)
        bootstrap = Bootstrap(24, draws=500, seed=trial)
        interval = bootstrap.ratio(means * tokens, tokens)
        inside += interval.low <= true_mean <= interval.high  # type: ignore[operator]
        draws = bootstrap.counts_RD @ (means * tokens) / (bootstrap.counts_RD @ tokens)
        low, high = np.quantile(draws, [0.025, 0.975])
        plain_inside += low <= true_mean <= high
    assert inside / trials > 0.92
    assert plain_inside < inside, "the expansion must earn its place"
