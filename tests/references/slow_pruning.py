"""Pruning, the slow and obvious way: one weight, one row, one column at a time, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def wanda(weight_OI: Floats, x_TI: Floats, share: float) -> Floats:
    """Of every row the ⌊share · I⌋ weights of smallest |w| · ‖x_j‖ become zero."""
    pruned = weight_OI.copy()
    norms = [sum(x * x for x in x_TI[:, j]) ** 0.5 for j in range(x_TI.shape[1])]
    for row in pruned:
        order = sorted(range(len(row)), key=lambda j: abs(row[j]) * norms[j])
        for j in order[: int(share * len(row) + 1e-9)]:
            row[j] = 0.0
    return pruned


def n_of_m(weight_OI: Floats, x_TI: Floats, zeros: int, every: int) -> Floats:
    """Of every M neighbours in a row the N of smallest |w| · ‖x_j‖ become zero."""
    pruned = weight_OI.copy()
    norms = np.sqrt((x_TI**2).sum(0))
    for row in pruned:
        for start in range(0, len(row), every):
            order = sorted(range(start, start + every), key=lambda j: abs(row[j]) * norms[j])
            for j in order[:zeros]:
                row[j] = 0.0
    return pruned


def sparsegpt(weight_OI: Floats, x_TI: Floats, share: float, *, damping: float, block: int = 128) -> Floats:
    """Optimal brain surgery from the left: after every column the inverse Hessian of what is still free is formed anew.

    The textbook form: H⁻¹ of the columns j… instead of one Cholesky factor, whose rows are the same up to √(H⁻¹)_jj.
    """
    hessian = x_TI.T @ x_TI
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    pruned = weight_OI.copy()
    n = pruned.shape[1]
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(n)]
    for start in range(0, n, block):
        stop = min(start + block, n)
        scores = np.stack([pruned[:, j] ** 2 / inverses[j][0, 0] for j in range(start, stop)], 1)
        count = int(share * scores.size + 1e-9)
        gone = np.zeros(scores.size, bool)
        gone[np.argsort(scores.ravel(), kind="stable")[:count]] = True
        gone = gone.reshape(scores.shape)
        for j in range(start, stop):
            for row in np.flatnonzero(gone[:, j - start]):
                pruned[row, j:] -= pruned[row, j] / inverses[j][0, 0] * inverses[j][0]
                pruned[row, j] = 0.0
    return pruned


def reconstructed(weight_OI: Floats, x_TI: Floats, kept: list[int], *, damping: float) -> Floats:
    """Least squares with a ridge, row by row: what the kept inputs must be multiplied with to give X Wᵀ."""
    ridge = damping * np.diag(x_TI.T @ x_TI)[kept].mean()
    seen = np.concatenate([x_TI[:, kept], ridge**0.5 * np.eye(len(kept))])
    found = np.zeros_like(weight_OI)
    for row, weights in enumerate(weight_OI):
        wanted = np.concatenate([x_TI @ weights, ridge**0.5 * weights[kept]])
        found[row, kept] = np.linalg.lstsq(seen, wanted, rcond=None)[0]
    return found


def block_influence(before_TD: Floats, after_TD: Floats) -> float:
    """1 − mean cosine of the angle between a token's vector before and after."""
    cosines = [
        float(b @ a / (b @ b) ** 0.5 / (a @ a) ** 0.5) for b, a in zip(before_TD, after_TD, strict=True)
    ]
    return 1 - sum(cosines) / len(cosines)
