"""GPTQ by the book, in float64, one output row and one input at a time: no runs, no batches, no shared factors.

After input i is rounded, the inputs that are left take -(w_i - ŵ_i) / [H⁻¹]_ii · [H⁻¹]_i, with H⁻¹ of the inputs that are
left, which is inverted anew every time (optimal brain surgeon, equation 2 of https://arxiv.org/abs/2210.17323).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def slow_gptq(
    weight_OI: Floats,
    gram_II: Floats,
    scale_OI: Floats,
    zero_OI: Floats,
    *,
    bits: int,
    damping: float,
    act_order: bool,
) -> Floats:
    """Codes [O, I]."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    hessian = gram_II.copy()
    mean = np.diag(gram_II).mean()
    for i in range(len(hessian)):
        hessian[i, i] += damping * mean + (gram_II[i, i] == 0)
    order = list(np.argsort(-np.diag(gram_II), kind="stable")) if act_order else list(range(len(gram_II)))
    codes = np.zeros_like(weight_OI)
    for row in range(len(weight_OI)):
        weight, left = weight_OI[row].copy(), list(order)
        while left:
            inverse = np.linalg.inv(hessian[np.ix_(left, left)])
            i = left[0]
            code = np.round(np.clip(weight[i] / scale_OI[row, i] + zero_OI[row, i], low, high))
            codes[row, i] = code
            error = weight[i] - (code - zero_OI[row, i]) * scale_OI[row, i]
            for place, j in enumerate(left):
                weight[j] -= error / inverse[0, 0] * inverse[0, place]
            left.pop(0)
    return codes


def layer_loss(weight_OI: Floats, after_OI: Floats, x_TI: Floats) -> float:
    """Σ ‖x (Ŵ - W)ᵀ‖² over tokens."""
    return float(np.square(x_TI @ (after_OI - weight_OI).T).sum())
