"""Distribution-free quantiles: what a handful of timings can and cannot say.

Timings are skewed and have several modes, so no bell curve is assumed. The q-quantile lies between the order
statistics x_(l) and x_(u) with probability Σ_{k=l}^{u−1} C(n,k) q^k (1−q)^{n−k}: for n = 30 the median lies in
[x_(10), x_(21)] with 95 %, whatever the distribution (David & Nagaraja, Order Statistics, §7.1). A percentile
beyond the largest sample cannot be seen: p_q is given only if n ≥ ln α / ln q (p90 needs 29 samples, p99 299).

MLPerf asks for more: a bound on the percentile that holds with 99 %. Its early stopping (inference_policies, "early stopping
criterion") lets t of n queries be slower than the bound if I_q(n − t, t + 1) ≤ 1 %, the chance that so few would be if the
bound were below the percentile; one slow query needs n = 64 for a p90, 662 for a p99.

It refuses to know what the samples are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ALPHA = 0.05
CORRELATED = 0.2
"""Lag-1 autocorrelation above which samples are no longer counted as independent, if it is no accident of n."""


@dataclass(frozen=True)
class Interval:
    """A quantile of n samples with its 95 % interval; a bound that n cannot give is None."""

    value: float
    low: float | None
    high: float | None
    n: int
    effective_n: int
    """As many independent samples would say as much; n unless neighbours resemble each other."""

    @property
    def half_width(self) -> float | None:
        """Half the interval's width as a share of the value; None where a bound is missing."""
        if self.low is None or self.high is None:
            return None
        return (self.high - self.low) / 2 / self.value


def smallest_n(q: float, *, alpha: float = ALPHA) -> int:
    """Samples needed before the q-quantile (q ≥ 0.5) is shown at all: n ≥ ln α / ln q."""
    return math.ceil(math.log(alpha) / math.log(q))


def interval_ranks(n: int, q: float, *, alpha: float = ALPHA) -> tuple[int | None, int | None]:
    """1-based ranks (l, u) of an equal-tailed 1 − α interval for the q-quantile; None where n is too small."""
    from scipy.stats import binom

    below = binom.cdf(np.arange(n + 1), n, q)  # P(at most k samples lie below the quantile)
    lower = int(np.searchsorted(below, alpha / 2, side="right"))
    upper = int(np.searchsorted(below, 1 - alpha / 2, side="left")) + 1
    return lower or None, upper if upper <= n else None


def quantile(samples: Sequence[float], q: float, *, alpha: float = ALPHA) -> Interval | None:
    """The q-quantile of samples in the order they were taken; None where n < ``smallest_n``.

    Where neighbours resemble each other (lag-1 autocorrelation r > 0.2, and beyond the 1.96 / √n that independent
    samples reach by accident) the ranks are those of n (1 − r) / (1 + r) samples, scaled to n: correlated samples must not pass for more than they are.
    """
    n = len(samples)
    if n == 0 or (q > 0.5 and n < smallest_n(q, alpha=alpha)):
        return None
    r = lag1_autocorrelation(samples)
    effective = max(1, round(n * (1 - r) / (1 + r))) if r > max(CORRELATED, 1.96 / math.sqrt(n)) else n
    lower, upper = interval_ranks(effective, q, alpha=alpha)
    ordered = np.sort(np.asarray(samples, dtype=float))
    return Interval(
        value=float(np.median(ordered)) if q == 0.5 else float(ordered[math.ceil(q * n) - 1]),
        low=None if lower is None else float(ordered[(lower - 1) * n // effective]),
        high=None if upper is None else float(ordered[-(-upper * n // effective) - 1]),
        n=n,
        effective_n=effective,
    )


def early_stopping_minimum(q: float, slow: int = 1, *, confidence: float = 0.99) -> int:
    """Queries needed before ``slow`` ≥ 1 of them may be slower than a bound on the q-quantile (MLPerf)."""
    from scipy.special import betainc

    fast = 1
    while betainc(fast, slow + 1, q) > 1 - confidence:
        fast += 1
    return fast + slow


def early_stopping_bound(samples: Sequence[float], q: float, *, confidence: float = 0.99) -> float | None:
    """MLPerf's estimate of the q-quantile, which it exceeds with 1 − confidence at most; None where n is too small.

    The largest of what is left when the t − 1 largest samples are dropped, t the most that n allows to be slow.
    """
    n, slow = len(samples), 0
    while early_stopping_minimum(q, slow + 1, confidence=confidence) <= n:
        slow += 1
    return float(np.sort(np.asarray(samples, dtype=float))[n - slow]) if slow else None


def lag1_autocorrelation(samples: Sequence[float]) -> float:
    """Correlation of each sample's rank with the next one's; 0 where it cannot be told (under 10, or constant).

    Ranks, because one outlier would drown the correlation of the values.
    """
    from scipy.stats import rankdata

    if len(samples) < 10 or len(set(samples)) == 1:
        return 0.0
    centred = rankdata(samples) - (len(samples) + 1) / 2
    return float((centred[1:] * centred[:-1]).sum() / (centred**2).sum())
