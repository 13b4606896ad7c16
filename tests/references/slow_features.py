"""Losses on a model's inside, written out in loops over plain numpy arrays: slow, obvious, without masks or batching."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def softmax(scores: Floats) -> Floats:
    """Of one row."""
    exp = np.exp(scores - scores.max())
    return exp / exp.sum()


def kl(p: Floats, q: Floats) -> float:
    """Nats."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def relation_loss(
    theirs_APK: Floats, ours_APK: Floats, counted: list[int], *, causal: bool, window: int | None = None
) -> float:
    """Σ over positions of the mean over heads of KL(softmax(t · tᵀ / √K) ‖ softmax(s · sᵀ / √K)) of one text."""
    total = 0.0
    for p in counted:
        for t_PK, s_PK in zip(theirs_APK, ours_APK, strict=True):
            first = 0 if window is None else max(0, p - window + 1)
            seen = range(first, p + 1) if causal else range(len(t_PK))
            t = softmax(np.array([t_PK[p] @ t_PK[q] / np.sqrt(t_PK.shape[1]) for q in seen]))
            s = softmax(np.array([s_PK[p] @ s_PK[q] / np.sqrt(s_PK.shape[1]) for q in seen]))
            total += kl(t, s) / len(theirs_APK)
    return total


def hidden_loss(theirs_PD: Floats, ours_PD: Floats, kind: str) -> float:
    """Σ over positions of ‖s − t‖² / ‖t‖², or of 1 − cos."""
    total = 0.0
    for t, s in zip(theirs_PD, ours_PD, strict=True):
        if kind == "squared":
            total += float(((s - t) ** 2).sum() / (t**2).sum())
        else:
            total += 1 - float(s @ t / np.sqrt((s @ s) * (t @ t)))
    return total
