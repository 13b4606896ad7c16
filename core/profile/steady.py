"""When has a program warmed up? Windows of medians that agree, without a trend through them.

A fixed number of warm-up iterations is wrong twice: too many for a fast model, too few for a slow one
(Kalibera & Jones, ISMM 2013; Barrett et al., OOPSLA 2017 found programs that never settle). So the series is cut
into windows; it is steady when the medians of the last windows differ from one to the next by less than the
tolerance, and a Mann–Kendall test finds no trend in them that amounts to more than the tolerance.

It refuses to know what the values are and who takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SteadyRule:
    """What counts as steady."""

    window: int
    """Iterations per window."""
    tolerance: float
    """Largest relative change from one window's median to the next."""
    windows: int = 3
    """Consecutive changes that must be within the tolerance; one window more is looked at."""
    p_value: float = 0.05
    """A trend with a smaller Mann–Kendall p-value is taken to be real."""

    @property
    def smallest_n(self) -> int:
        """Iterations that must be seen before anything can be called steady."""
        return self.window * (self.windows + 1)


def is_steady(values: Sequence[float], rule: SteadyRule) -> bool:
    """Whether the end of a series (any positive unit, oldest first) has settled under a rule."""
    if len(values) < rule.smallest_n:
        return False
    recent = np.asarray(values[-rule.smallest_n :], dtype=float)
    medians = np.median(recent.reshape(rule.windows + 1, rule.window), axis=1)
    if np.any(np.abs(medians[1:] / medians[:-1] - 1) >= rule.tolerance):
        return False
    return trend_p_value(recent) > rule.p_value or relative_drift(recent) < rule.tolerance


def trend_p_value(values: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of the Mann–Kendall test: Kendall's τ between value and time; 1 for constant values."""
    from scipy.stats import kendalltau

    p_value = float(kendalltau(np.arange(len(values)), values).pvalue)
    return 1.0 if np.isnan(p_value) else p_value


def relative_drift(values: Sequence[float] | np.ndarray) -> float:
    """How far the Theil–Sen line moves from first to last value, as a share of the median.

    With enough samples the test finds a drift of a thousandth: real, and of no consequence to the median.
    """
    from scipy.stats import theilslopes

    slope = theilslopes(values).slope
    return float(abs(slope) * (len(values) - 1) / np.median(values))
