"""Router rules token by token, in plain Python: what ``core/routing/rules.py`` computes at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

Decision = dict[int, float]
"""Chosen expert → routing weight."""


def deepseek_v3(
    logits: Sequence[float],
    bias: Sequence[float],
    *,
    top_k: int,
    n_groups: int,
    top_groups: int,
    scale: float,
) -> Decision:
    """DeepSeek-V3 (arXiv 2412.19437, eq. 12–16 and node-limited routing): sigmoid, bias, groups, renormalised."""
    score = [1 / (1 + math.exp(-logit)) for logit in logits]
    choice = [s + b for s, b in zip(score, bias, strict=True)]
    size = len(logits) // n_groups
    members = [range(group * size, (group + 1) * size) for group in range(n_groups)]
    strength = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in members]
    kept = sorted(range(n_groups), key=lambda group: -strength[group])[:top_groups]
    allowed = [e for group in kept for e in members[group]]
    chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
    total = sum(score[e] for e in chosen)
    return {e: score[e] / total * scale for e in chosen}


def softmax_topk(logits: Sequence[float], *, top_k: int, renormalised: bool) -> Decision:
    """Softmax over all experts, the k largest; divided by their sum or not (OLMoE, Mixtral)."""
    exponent = [math.exp(logit - max(logits)) for logit in logits]
    probability = [e / sum(exponent) for e in exponent]
    chosen = sorted(range(len(logits)), key=lambda e: -probability[e])[:top_k]
    total = sum(probability[e] for e in chosen) if renormalised else 1.0
    return {e: probability[e] / total for e in chosen}
