"""95 % intervals of means over few independent repeats (random sequences, documents): Student's t."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def half_width(values_SX: Floats) -> Floats:
    """Half of the 95 % interval of the mean over the first axis; NaN for a single value."""
    from scipy.special import stdtrit  # here: the UI process reads this module through the registry

    n = len(values_SX)
    if n < 2:
        return np.full(values_SX.shape[1:], np.nan)
    half: Floats = stdtrit(n - 1, 0.975) * values_SX.std(0, ddof=1) / np.sqrt(n)
    return half
