"""Losses against a teacher, written down term by term in double precision: what the fast ones must equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def softmax(logits: Row, temperature: float) -> list[float]:
    top = max(logits)
    powers = [math.exp((logit - top) / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def lumped(p: Row, kept: Sequence[int]) -> list[float]:
    """The kept tokens' probabilities, then that of all others together."""
    return [*(p[token] for token in kept), sum(p[token] for token in range(len(p)) if token not in kept)]


def kl(p: Row, q: Row) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mixture(p: Row, q: Row, share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def divergence(name: str, p: Row, q: Row, *, beta: float, alpha: float) -> float:
    """p teacher, q student."""
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        m = mixture(p, q, beta)
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skew_kl":
        return kl(p, mixture(p, q, alpha))
    assert name == "skew_reverse_kl"
    return kl(q, mixture(q, p, alpha))


def loss(
    name: str,
    student: Row,
    teacher: Row,
    *,
    temperature: float,
    beta: float,
    alpha: float,
    kept: Sequence[int] | None = None,
) -> float:
    """T² · divergence of one position, over all tokens or over ``kept`` ones and the rest."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    if kept is not None:
        p, q = lumped(p, kept), lumped(q, kept)
    return temperature**2 * divergence(name, p, q, beta=beta, alpha=alpha)
