"""Is B faster than A? The two in turn, block by block in one session, and what their paired log-ratios allow to say.

A block is A B B A or B A A B, so a machine that drifts at a constant rate slows both alike. Its effect is
d = ln(time of B / time of A). The centre is the Hodges–Lehmann estimate (the median of all pairwise means, of a pair with
itself too: one wild block hardly moves it); its interval is a bootstrap over blocks (``Bootstrap``'s expanded percentile),
made wider by √((1 + r) / (1 − r)) where neighbouring blocks resemble each other (lag-1 autocorrelation r > 0.2; in
simulations of 12 to 48 blocks that keeps what it promises better than a moving-block bootstrap).

Three answers that exclude each other. *Equivalent*: the whole 95 % interval lies within ±ln(1 + δ), as by two one-sided tests at
2.5 % (TOST, Schuirmann 1987). *Faster*: the interval leaves out 0, and δ is not excluded. *Inconclusive*: all else. Times of
different sessions are not paired, so nothing here may be asked of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput
from core.evaluate._intervals import MIN_DOCUMENTS, Bootstrap
from core.profile.quantiles import CORRELATED, lag1_autocorrelation

Called = Literal["a is faster", "b is faster", "equivalent", "inconclusive"]
Floats = NDArray[np.float64]

DELTA = 0.03
"""Smallest difference in time that is cared about, as a share."""
DRAWS = 10_000
FEWEST = MIN_DOCUMENTS
"""Blocks below which there is no interval."""


@dataclass(frozen=True)
class PairVerdict:
    """What paired blocks say."""

    verdict: Called
    ratio: float
    """B's speed as a multiple of A's: above 1, b is faster."""
    low: float | None
    high: float | None
    """95 % interval of the ratio; None with fewer than ``FEWEST`` blocks."""
    n_blocks: int
    more_blocks: int | None
    """About how many further blocks would decide it; None where it is decided."""
    delta: float
    interval: str
    """How the interval was made."""

    @property
    def sentence(self) -> str:
        """The verdict with its numbers, for a reader."""
        if self.low is None or self.high is None:
            return f"Inconclusive: {self.n_blocks} blocks are too few for an interval; measure {self.more_blocks} more."
        numbers = f"b runs at {self.ratio:.3f}× the speed of a (95 %: {self.low:.3f} to {self.high:.3f}, {self.n_blocks} blocks)"
        match self.verdict:
            case "equivalent":
                return f"Equivalent within {self.delta:.0%}: {numbers}."
            case "inconclusive":
                return f"Inconclusive: {numbers}; about {self.more_blocks} more blocks would decide it."
            case _:
                nearest = self.low if self.ratio > 1 else self.high
                sure = abs(math.log(nearest)) > math.log1p(self.delta)
                doubt = "" if sure else f"; that it is more than {self.delta:.0%} is not certain"
                return f"{self.verdict[0].upper()} is faster: {numbers}{doubt}."


def compare_blocks(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    delta: float = DELTA,
    seed: int = 0,
    draws: int = DRAWS,
) -> PairVerdict:
    """Judge times of A and B, one of each per block in the order they were taken (any positive unit).

    Raises ``BadInput`` for unequal lengths, no block, a time that is not positive and finite, or a delta outside (0, 1).
    """
    times = [np.asarray(side, dtype=np.float64) for side in (a, b)]
    if times[0].shape != times[1].shape or times[0].ndim != 1 or times[0].size == 0:
        raise BadInput("paired blocks need one time of a and one of b for each block, and at least one block")
    if not all(np.isfinite(side).all() and (side > 0).all() for side in times):
        raise BadInput("times of blocks must be positive; leave out blocks that were not measured")
    if not 0 < delta < 1:
        raise BadInput(f"delta {delta:g} is no share; give the difference that matters, e.g. 0.03 for 3 %")
    effects = np.log(times[1]) - np.log(times[0])
    n, centre = len(effects), float(_hodges_lehmann(effects[None])[0])
    found = _interval(effects, centre, draws=draws, seed=seed)
    if found is None:
        too_few = f"none: {n} blocks are too few"
        return PairVerdict(
            "inconclusive", math.exp(-centre), None, None, n, max(FEWEST - n, 1), delta, too_few
        )
    low, high, how = found
    margin = math.log1p(delta)
    verdict = _called(low, high, margin)
    return PairVerdict(
        verdict,
        ratio=math.exp(-centre),
        low=math.exp(-high),
        high=math.exp(-low),
        n_blocks=n,
        more_blocks=_more(n, (high - low) / 2, margin) if verdict == "inconclusive" else None,
        delta=delta,
        interval=how,
    )


def _called(low: float, high: float, margin: float) -> Called:
    """The verdict on an interval of ln(time of B / time of A)."""
    if -margin < low and high < margin:
        return "equivalent"
    if low > 0:
        return "a is faster"
    return "b is faster" if high < 0 else "inconclusive"


def _more(n: int, half_width: float, margin: float) -> int:
    """Blocks to go until the half-width is δ/2, when every effect is decided: (2 · 1.96 · s / δ)² in all."""
    return max(1, math.ceil(n * (2 * half_width / margin) ** 2) - n)


def _interval(effects: Floats, centre: float, *, draws: int, seed: int) -> tuple[float, float, str] | None:
    n = len(effects)

    def statistic(counts_RD: NDArray[np.int64]) -> Floats:
        drawn = np.repeat(np.tile(np.arange(n), len(counts_RD)), counts_RD.ravel())
        return _hodges_lehmann(effects[drawn].reshape(len(counts_RD), n))

    found = Bootstrap(n, draws=draws, seed=seed, unit="blocks").of(statistic)
    if found.low is None or found.high is None:
        return None
    r = lag1_autocorrelation(effects.tolist())
    if r <= CORRELATED:
        return found.low, found.high, found.how
    wider = math.sqrt((1 + r) / (1 - r))
    low, high = centre - (centre - found.low) * wider, centre + (found.high - centre) * wider
    return low, high, f"{found.how}, × {wider:.2f} since neighbouring blocks resemble each other"


def _hodges_lehmann(values_RN: Floats) -> Floats:
    """The median of all pairwise means of each row."""
    first, second = np.triu_indices(values_RN.shape[1])
    centres: Floats = np.median((values_RN[:, first] + values_RN[:, second]) / 2, axis=1)
    return centres
