"""Unbiased HSIC as a mean over ordered 4-tuples of different rows: the definition, of no use beyond twelve rows."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def hsic(x_ND: Floats, y_NE: Floats) -> float:
    """Mean over i, j, q, r all different of K_ij (L_ij + L_qr − 2 L_iq); K and L are linear kernels."""
    k, m = x_ND @ x_ND.T, y_NE @ y_NE.T
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(len(k)), 4)]
    return float(np.mean(terms))
