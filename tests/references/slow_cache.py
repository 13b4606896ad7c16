"""A cache simulated as its definition: one capacity at a time, a set of residents, a victim chosen by looking."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def hits(policy: str, requests: Sequence[int], slots: int, hot: Sequence[int] = ()) -> list[bool]:
    """Which requests a cache of ``slots`` answers, empty at first; ``hot`` ranks experts for ``static``."""
    held: set[int] = set()
    found = []
    for now, expert in enumerate(requests):
        found.append(expert in held)
        if policy == "static":
            if expert in hot[:slots]:
                held.add(expert)
            continue
        held.add(expert)
        if len(held) > slots:
            past, future = requests[: now + 1], requests[now + 1 :]
            candidates = held if policy == "belady" or slots == 0 else held - {expert}
            held.remove(min(candidates, key=lambda e: _worth(policy, e, past, future)))
    return found


def _worth(policy: str, expert: int, past: Sequence[int], future: Sequence[int]) -> tuple[int, int]:
    """The expert that is worth least goes."""
    last_use = len(past) - 1 - list(reversed(past)).index(expert)
    if policy == "lru":
        return last_use, 0
    if policy == "lfu":
        return list(past).count(expert), last_use
    return (-list(future).index(expert) if expert in future else -len(future) - 1), 0


def most_hits(requests: Sequence[int], slots: int) -> int:
    """The most hits any cache could have: every choice of what to hold is tried."""

    @cache
    def best(now: int, held: frozenset[int]) -> int:
        if now == len(requests):
            return 0
        wanted = requests[now]
        if wanted in held:
            return 1 + best(now + 1, held)
        choices = [held]  # let the newcomer pass through
        if len(held) < slots:
            choices.append(held | {wanted})
        choices += [held - {gone} | {wanted} for gone in held] if slots else []
        return max(best(now + 1, frozenset(choice)) for choice in choices)

    return best(0, frozenset())
