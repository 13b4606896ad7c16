"""95 % intervals of numbers counted on tokens, when the tokens of one document resemble each other.

Legend: G groups of documents, X whatever is counted (any shape), D draws.

The group, never the token, is the independent thing. A share is a ratio of two sums over groups and has the ratio
estimator's interval (Cochran, Sampling Techniques, 3rd ed. 1977, section 6.3); any other statistic of the counts has
the jackknife's (Tukey 1958), which leaves out one group at a time. Both use Student's t with G − 1 degrees of
freedom and put the number itself in the middle. Knows nothing about models or routing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.evaluate._intervals import MIN_DOCUMENTS

Floats = NDArray[np.float64]
GROUPS = 32
"""Documents are dealt out to at most this many groups: more would make an interval slower and hardly better."""


def student_t(n_groups: int) -> float:
    """Student's t at 97.5 %; NaN where there are too few groups for any interval."""
    from scipy.special import stdtrit  # here: the UI process reads this module through the registry

    return float(stdtrit(n_groups - 1, 0.975)) if n_groups >= MIN_DOCUMENTS else float("nan")


def ratio_half(numerator_GX: NDArray[Any], denominator_GX: NDArray[Any]) -> Floats:
    """Half of the interval of Σ numerator / Σ denominator over groups; the two are broadcast against each other."""
    n = len(numerator_GX)
    whole_X = denominator_GX.sum(0)
    residual_GX = numerator_GX - numerator_GX.sum(0) / whole_X * denominator_GX
    spread_X = np.sqrt(n / max(1, n - 1) * np.square(residual_GX).sum(0))
    half_X: Floats = student_t(n) * spread_X / whole_X
    return half_X


def jackknife_half(counts_GX: NDArray[Any], statistic: Callable[[NDArray[Any]], Floats]) -> Floats:
    """Half of the interval of ``statistic(Σ counts)``; ``statistic`` maps [batch, X] to [batch, …]."""
    n = len(counts_GX)
    without_G = statistic(counts_GX.sum(0)[None] - counts_GX)
    spread = np.sqrt((n - 1) / n * np.square(without_G - without_G.mean(0)).sum(0))
    half: Floats = student_t(n) * spread
    return half


def described(n_documents: int, n_groups: int, how: str) -> str:
    """How an interval was made, for a reader; empty where there is none."""
    if n_groups < MIN_DOCUMENTS:
        return ""
    of = (
        f"{n_documents} documents"
        if n_documents == n_groups
        else f"{n_groups} groups of {n_documents} documents"
    )
    return f"{how} over {of}, Student's t"
