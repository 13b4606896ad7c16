"""95 % intervals for quality numbers: bootstrap over documents, and Wilson for shares at 0 or 1.

Tokens of one document resemble each other, so the document is what is resampled, never the token. A number
that compares two models uses the same draws for both: it is paired by construction.

The plain percentile interval is too short for few documents. The interval here is the *expanded percentile*
one (Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69(4), 2015,
section 4.1.2): the percentiles are taken further out, by as much as Student's t with n - 1 degrees of freedom and the factor
sqrt(n / (n - 1)) are wider than the normal distribution.

Letters: D documents, R draws, N tokens. Knows nothing about models or text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MIN_DOCUMENTS = 8
"""With fewer there is no interval: too few ways to resample them for a 2.5 % tail."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and how it was made; both ends are None where none can be given."""

    low: float | None
    high: float | None
    how: str

    @classmethod
    def exact(cls, value: float, why: str) -> Interval:
        """A number that is known, not estimated."""
        return cls(value, value, f"exact: {why}")

    def mapped(self, increasing: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the number."""
        if self.low is None or self.high is None:
            return self
        return Interval(increasing(self.low), increasing(self.high), self.how)


class Bootstrap:
    """Draws of documents with replacement, made once and shared by all numbers of one evaluation."""

    def __init__(self, n_documents: int, *, draws: int, seed: int, unit: str = "documents") -> None:
        generator = np.random.default_rng(seed)
        self.n_documents = n_documents
        self.draws = draws
        self.unit = unit
        self.counts_RD: NDArray[np.int64] = generator.multinomial(
            n_documents, np.full(n_documents, 1 / n_documents), size=draws
        )

    def ratio(self, numerator_D: Floats, denominator_D: Floats) -> Interval:
        """Interval of sum(numerator) / sum(denominator), e.g. nats per token."""
        return self.of(lambda counts_RD: (counts_RD @ numerator_D) / (counts_RD @ denominator_D))

    def quantile(self, values_N: Floats, document_N: NDArray[np.int64], q: float) -> Interval:
        """Interval of the q-quantile of all tokens' values (the smallest value with a share q at or below)."""
        order = np.argsort(values_N, kind="stable")
        sorted_N, owner_N = values_N[order], document_N[order]

        def quantiles(counts_RD: NDArray[np.int64]) -> Floats:
            cumulative_RN = np.cumsum(counts_RD[:, owner_N], axis=1)
            wanted_R1 = q * cumulative_RN[:, -1:]
            reached_R: Floats = sorted_N[np.argmax(cumulative_RN >= wanted_R1, axis=1)]
            return reached_R

        return self.of(quantiles)

    def of(self, statistic: Callable[[NDArray[np.int64]], Floats]) -> Interval:
        """Interval of any statistic that maps document counts [R, D] to values [R]."""
        n = self.n_documents
        if n < MIN_DOCUMENTS:
            return Interval(None, None, "")
        # 64 draws at a time: a statistic over tokens would otherwise need draws × tokens numbers at once.
        parts = [statistic(self.counts_RD[start : start + 64]) for start in range(0, self.draws, 64)]
        drawn = np.concatenate(parts)
        if not np.isfinite(drawn).all():
            return Interval(None, None, "none: the number is undefined in some draws")
        low, high = np.quantile(drawn, [_tail(n), 1 - _tail(n)])
        how = f"paired bootstrap over {n} {self.unit}, {self.draws} draws, expanded percentile"
        return Interval(float(low), float(high), how)

    def share(self, hits_D: Floats, trials_D: Floats, *, of: str = "tokens") -> Interval:
        """Interval of a share; Wilson's where no or every trial hit, as resampling cannot leave 0 or 1 there.

        ``of`` names the trials in the interval's description.
        """
        hits, trials = int(hits_D.sum()), int(trials_D.sum())
        if 0 < hits < trials:
            return self.ratio(hits_D, trials_D)
        return Interval(*wilson(hits, trials), f"Wilson, {trials} {of} taken as independent")


def _tail(n: int) -> float:
    """The share to cut from each end of the draws: 2.5 % for many documents, less for few."""
    from scipy.special import stdtrit  # here: the UI process reads this module through the registry

    return NormalDist().cdf(sqrt(n / (n - 1)) * float(stdtrit(n - 1, (1 - CONFIDENCE) / 2)))


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval at 95 % for a share of independent trials (JASA 22, 1927)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = hits / trials
    centre = share + z * z / (2 * trials)
    reach = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # The share is always inside; rounding would put 7 of 7 above its own upper bound.
    return max(0.0, min(share, (centre - reach) / scale)), min(1.0, max(share, (centre + reach) / scale))
