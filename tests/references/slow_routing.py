"""Slow, obvious counts of routing decisions: loops over tokens and slots, nothing shared with the probes."""

from __future__ import annotations

from collections import Counter
from itertools import permutations, product
from typing import Any


def pairs_by_hand(experts_TK: Any) -> Counter[tuple[int, int]]:
    """Tokens that were given both experts, ordered pairs; an expert with itself counts its load."""
    counts: Counter[tuple[int, int]] = Counter()
    for experts in experts_TK.tolist():
        counts.update(permutations(experts, 2))
        counts.update((expert, expert) for expert in experts)
    return counts


def flow_by_hand(here_TK: Any, there_TK: Any, here_w: Any, there_w: Any) -> Counter[tuple[int, int]]:
    """Flow of every (expert here, expert there): the root of the product of both weights, all pairs of a token."""
    flow: Counter[tuple[int, int]] = Counter()
    for token, (here, there) in enumerate(zip(here_TK.tolist(), there_TK.tolist(), strict=True)):
        for (a, i), (b, j) in product(enumerate(here), enumerate(there)):
            flow[i, j] += (here_w[token, a] * there_w[token, b]) ** 0.5
    return flow


def dead_by_hand(experts_LTK: Any, document_T: Any, order: list[int], n: int, n_experts: int) -> float:
    """Share of all experts not chosen by the first n tokens when documents come in this order."""
    tokens = [t for document in order for t in range(len(document_T)) if document_T[t] == document][:n]
    missing = total = 0
    for layer in experts_LTK:
        seen = {int(expert) for t in tokens for expert in layer[t]}
        missing += n_experts - len(seen)
        total += n_experts
    return missing / total


def auc_by_hand(margin_T: Any, flipped_T: Any) -> float:
    """Share of (flipped, kept) pairs in which the flipped one has the smaller margin; ties count half."""
    flipped = [m for m, f in zip(margin_T, flipped_T, strict=True) if f]
    kept = [m for m, f in zip(margin_T, flipped_T, strict=True) if not f]
    wins = [1.0 if a < b else 0.5 if a == b else 0.0 for a, b in product(flipped, kept)]
    return sum(wins) / len(wins)
