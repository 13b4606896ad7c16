"""Paired blocks: the estimate against its definition, the verdicts by their rule, and simulated clocks that are told apart or not."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from core.errors import BadInput
from core.profile.paired_blocks import DELTA, compare_blocks

RANDOM = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _from_the_start():
    """Each test draws the same numbers, whichever were run before it."""
    global RANDOM
    RANDOM = np.random.default_rng(7)


def judged(effects, **options):
    """The verdict on log-ratios, as times around 20 ms."""
    a = 20 * np.exp(RANDOM.normal(0, 0.05, len(effects)))  # what both sides share cancels
    return compare_blocks(a, a * np.exp(effects), **options)


def test_the_centre_is_the_median_of_all_pairwise_means():
    effects = RANDOM.normal(0.01, 0.02, 15).tolist()
    means = [(x + y) / 2 for x, y in itertools.combinations_with_replacement(effects, 2)]
    assert judged(effects, draws=100).ratio == pytest.approx(math.exp(-statistics.median(means)))


def test_swapping_the_sides_turns_everything_over():
    a, b = 20 + RANDOM.random(12), 21 + RANDOM.random(12)
    one, other = compare_blocks(a, b, draws=500), compare_blocks(b, a, draws=500)
    assert one.ratio == pytest.approx(1 / other.ratio)
    assert (one.low, one.high) == pytest.approx((1 / other.high, 1 / other.low), rel=1e-2)
    assert {one.verdict, other.verdict} == {"a is faster", "b is faster"}


def test_one_wild_block_moves_neither_centre_nor_verdict():
    calm = RANDOM.normal(0, 0.004, 20)
    wild = calm.copy()
    wild[3] = 1.5
    assert judged(wild).verdict == judged(calm).verdict == "equivalent"
    assert judged(wild).ratio == pytest.approx(judged(calm).ratio, abs=2e-3)


def test_the_interval_of_normal_effects_is_students():
    from scipy.stats import t

    widths = []
    for _ in range(20):
        effects = RANDOM.normal(0, 0.02, 30)
        found = judged(effects, draws=2000)
        student = t.ppf(0.975, 29) * effects.std(ddof=1) / math.sqrt(30)
        widths.append(math.log(found.high / found.low) / 2 / student)
    assert (
        0.9 < statistics.mean(widths) < 1.25
    )  # wider by the little that the median of means costs, and by correlation


@pytest.mark.parametrize(
    ("centre", "spread", "verdict"),
    [
        (0.0, 0.004, "equivalent"),
        (0.015, 0.004, "equivalent"),  # a real difference, and one that does not matter
        (0.08, 0.01, "a is faster"),
        (-0.08, 0.01, "b is faster"),
        (0.0, 0.1, "inconclusive"),
    ],
)
def test_verdicts_are_those_of_two_one_sided_tests(centre, spread, verdict):
    """TOST in closed form on the same effects: equivalent if and only if both one-sided tests at 2.5 % reject."""
    from scipy.stats import t

    effects = RANDOM.normal(0, 1, 16)
    effects = centre + spread * (effects - effects.mean()) / effects.std(ddof=1)
    found = judged(effects)
    assert found.verdict == verdict
    error = effects.std(ddof=1) / 4
    margin = math.log1p(DELTA)
    upper, lower = ((effects.mean() - margin) / error, (effects.mean() + margin) / error)
    both_reject = t.cdf(upper, 15) < 0.025 and t.sf(lower, 15) < 0.025
    assert both_reject == (found.verdict == "equivalent")


def test_how_many_more_blocks():
    """(2 · 1.96 · s / δ)² in all; with so many an effect is decided."""
    effects = RANDOM.normal(0, 1, 40)
    effects = 0.1 * (effects - effects.mean()) / effects.std(ddof=1)
    found = judged(effects)
    wanted = (2 * 1.96 * 0.1 / DELTA) ** 2
    assert found.verdict == "inconclusive"
    assert 0.7 * wanted < 40 + found.more_blocks < 1.7 * wanted
    assert judged(RANDOM.normal(0, 0.1, 40 + found.more_blocks), draws=200).more_blocks in (
        None,
        *range(1, 150),
    )
    assert str(found.more_blocks) in found.sentence


def test_too_few_blocks_say_so():
    found = compare_blocks([1.0] * 5, [2.0] * 5)
    assert (found.verdict, found.low, found.more_blocks) == ("inconclusive", None, 3)
    assert "too few" in found.sentence


@pytest.mark.parametrize(
    ("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 1.0]), ([1.0], [float("nan")])]
)
def test_what_is_no_pair_of_times_is_refused(a, b):
    with pytest.raises(BadInput):
        compare_blocks(a, b)


# --- simulated clocks ---------------------------------------------------------------------------------------


def correlated(shape: tuple[int, int], rho: float) -> np.ndarray:
    """Noise of unit variance whose neighbours in time correlate by rho, a row per session."""
    fresh = RANDOM.normal(size=shape)
    noise = np.empty(shape)
    noise[:, 0] = fresh[:, 0]
    for i in range(1, shape[1]):
        noise[:, i] = rho * noise[:, i - 1] + math.sqrt(1 - rho**2) * fresh[:, i]
    return noise


def sessions(n: int, *, slower: float = 1.0, noise: np.ndarray, drift: float = 0.0, blocks: int = 12):
    """Times (a, b) of each session's blocks: stretches in turn ABBA or BAAB, 20 ms each, b ``slower`` times as long."""
    log = noise + np.linspace(0, drift, 4 * blocks)
    four = log.reshape(n, blocks, 4)
    outer, inner = four[..., [0, 3]].mean(-1), four[..., [1, 2]].mean(-1)
    a_outside = RANDOM.random((n, blocks)) < 0.5
    a, b = np.where(a_outside, outer, inner), np.where(a_outside, inner, outer)
    return 20 * np.exp(a), 20 * slower * np.exp(b)


def called(a: np.ndarray, b: np.ndarray) -> list[str]:
    return [compare_blocks(x, y, draws=1000).verdict for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize(("rho", "noise"), [(0.0, 0.02), (0.9, 0.2)])
def test_equal_variants_are_called_different_in_at_most_5_percent_of_1000_sessions(rho, noise):
    """Independent noise, or creeping noise too large to be equivalent in; on a machine that slows by a tenth meanwhile."""
    found = called(*sessions(1000, noise=noise * correlated((1000, 48), rho), drift=0.1))
    assert sum(verdict in ("a is faster", "b is faster") for verdict in found) <= 50
    assert (found.count("equivalent") > 900) == (noise < DELTA)


def test_a_slow_down_of_3_percent_is_called():
    found = called(*sessions(1000, slower=1.03, noise=0.01 * correlated((1000, 48), 0.9), drift=0.1))
    assert found.count("b is faster") == 0
    assert found.count("a is faster") >= 0.95 * 1000


def test_the_order_matters_under_drift():
    """Twin: A A … B B on the same drifting machine calls twins different; ABBA does not."""
    log = np.linspace(0, 0.3, 48) + 0.01 * RANDOM.normal(size=48)
    halves = np.exp(log).reshape(2, 12, 2).mean(-1)
    assert compare_blocks(halves[0], halves[1]).verdict == "a is faster"
    a, b = sessions(1, noise=0.01 * RANDOM.normal(size=(1, 48)), drift=0.3)
    assert compare_blocks(a[0], b[0]).verdict == "equivalent"
