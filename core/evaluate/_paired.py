"""Two models' answers to the same examples: does one answer better, beyond chance?

The difference has a bootstrap interval over the examples, both models on the same draws. McNemar's test asks more
exactly: of the examples that just one of the two gets right, is it always the same one? Under no difference each such
example is a fair coin, so the p-value is the exact binomial one, without any approximation (McNemar, Psychometrika 12,
1947; Edwards' or a χ² correction is not needed). Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.evaluate._intervals import Bootstrap

Rights = NDArray[np.bool_]


@dataclass(frozen=True)
class Paired:
    """How the accuracy of ``b`` differs from that of ``a``, on the same examples."""

    n: int
    accuracy_a: float
    accuracy_b: float
    only_a: int
    """Examples that only a gets right."""
    only_b: int
    difference: float
    """accuracy_b - accuracy_a."""
    low: float | None
    high: float | None
    p_value: float
    """Exact McNemar, two-sided."""


def compare(a_N: Rights, b_N: Rights, *, draws: int, seed: int) -> Paired:
    """Compare two models by which examples each gets right."""
    moved_N = b_N.astype(np.float64) - a_N.astype(np.float64)
    only_a, only_b = int((moved_N < 0).sum()), int((moved_N > 0).sum())
    bootstrap = Bootstrap(len(moved_N), draws=draws, seed=seed, unit="examples")
    between = bootstrap.ratio(moved_N, np.ones_like(moved_N))
    return Paired(
        n=len(moved_N),
        accuracy_a=float(a_N.mean()),
        accuracy_b=float(b_N.mean()),
        only_a=only_a,
        only_b=only_b,
        difference=float(moved_N.mean()),
        low=between.low,
        high=between.high,
        p_value=mcnemar(only_a, only_b),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """P(a split at least as uneven | each is a fair coin); 1 where no example tells the two apart."""
    from scipy.special import bdtr  # here: the UI process reads this module through the registry

    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))
