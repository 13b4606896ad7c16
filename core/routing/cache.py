"""An expert cache replayed: which requests for experts a memory of so many slots would have answered.

Legend: N requests of one layer in order, S steps (decoded tokens, or chunks of a prompt), E experts, T tokens, K slots
of the router. Every layer has a cache of its own.

In one step each wanted expert is asked for once, in ascending order, as a loop over the hit experts does it: a decoded
token asks for its k experts, a chunk of a prompt for all that any of its tokens chose. All four policies are stack
algorithms (Mattson et al., IBM Systems Journal 9(2), 1970): what a cache of C slots holds is held by one of C + 1
slots, too, so one pass over the trace gives each request the smallest cache that answers it, and with it the hits of
every capacity. Knows no model and no clock; ``traffic.py`` turns misses into bytes and milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Policy = Literal["lru", "lfu", "static", "belady"]
"""Whom a full cache lets go:

- ``lru``: the expert whose last use is longest ago.
- ``lfu``: the one used least often since the beginning, of equals the one whose last use is longest ago.
- ``static``: nobody. The C experts used most often in ``hot`` have their slots for good; others pass through.
- ``belady``: the one whose next use is farthest away, the newcomer itself included (Belady 1966; with bypass). It
  knows the future, so no policy can hit more often.
"""
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True)
class Requests:
    """What one layer asks of its cache, in order."""

    experts_N: Ints
    step_N: Ints
    """The step of each request, rising."""
    n_steps: int

    def per_step(self, counted_N: NDArray[np.bool_]) -> Ints:
        """How many of the marked requests each step made, [S]."""
        return np.bincount(self.step_N[counted_N], minlength=self.n_steps).astype(np.int64)

    @classmethod
    def of(cls, experts_TK: Ints, *, tokens_per_step: int) -> Requests:
        """One step per ``tokens_per_step`` tokens, the last one shorter; ids below 0 are padding."""
        steps = [
            np.unique(experts_TK[low : low + tokens_per_step])
            for low in range(0, len(experts_TK), tokens_per_step)
        ]
        steps = [wanted[wanted >= 0] for wanted in steps]
        counts = np.array([len(wanted) for wanted in steps], dtype=np.int64)
        experts_N = np.concatenate(steps) if steps else np.empty(0)
        return cls(experts_N.astype(np.int64), np.repeat(np.arange(len(steps)), counts), len(steps))

    def then(self, later: Requests) -> Requests:
        """These requests, and afterwards others: decoding finds the cache as the prompt left it."""
        return Requests(
            np.concatenate([self.experts_N, later.experts_N]),
            np.concatenate([self.step_N, later.step_N + self.n_steps]),
            self.n_steps + later.n_steps,
        )


def slots_needed(policy: Policy, experts_N: Ints, n_experts: int, *, hot_E: Ints | None = None) -> Ints:
    """Fewest slots with which each request is a hit, [N]; ``n_experts`` + 1 for the first request of an expert.

    The cache is empty at first and filled by misses only. ``hot_E`` says how often each expert was used in the trace
    that ``static`` was set up by; without it, it is set up by these requests themselves.
    """
    if policy == "static":
        return _static(experts_N, n_experts, hot_E)
    rank_of, admits_always = _ORDERS[policy]
    return _stack(experts_N, rank_of(experts_N), n_experts, admits_always=admits_always)


def hit_rates(slots_N: Ints, n_experts: int) -> Floats:
    """Share of requests answered by caches of 0 … E slots, [E + 1]; NaN without a request."""
    if not len(slots_N):
        return np.full(n_experts + 1, np.nan)
    hits_C = np.bincount(slots_N, minlength=n_experts + 2)[: n_experts + 1].cumsum()
    return np.asarray(hits_C / len(slots_N), dtype=np.float64)


def knee(rates_C: Floats) -> tuple[int, float]:
    """The capacity whose hit rate is farthest above the straight line from no slots to all, and how far.

    Kneedle's point (Satopää et al. 2011). Uniform routing hits in proportion to its slots: how far is then near 0, and
    the capacity says nothing.
    """
    line_C = np.linspace(rates_C[0], rates_C[-1], len(rates_C))
    above_C = rates_C - line_C
    best = int(np.argmax(above_C))
    return best, float(above_C[best])


def uniform_experts_touched(n_experts: int, top_k: int, tokens: Ints | Floats) -> Floats:
    """E · (1 − (1 − k/E)^T): distinct experts that T tokens touch on average if each picks any k at random."""
    return np.asarray(n_experts * (1 - (1 - top_k / n_experts) ** np.asarray(tokens)), dtype=np.float64)


def _stack(experts_N: Ints, rank_N: list[tuple[int, int]], n_experts: int, *, admits_always: bool) -> Ints:
    """Mattson's stack under a priority: position d of the stack joins what d slots hold to what d − 1 do.

    ``rank_N`` is the priority that a request gives its expert until that expert's next request. A newcomer that is
    always admitted goes on top; otherwise it must beat what is there. What is displaced sinks until it beats another,
    or takes the place that the requested expert left.
    """
    stack: list[int] = []
    rank: dict[int, tuple[int, int]] = {}
    found = np.full(len(experts_N), n_experts + 1, dtype=np.int64)
    for request, expert in enumerate(experts_N.tolist()):
        if expert in rank:
            left = stack.index(expert)
            found[request] = left + 1
        else:
            left = len(stack)
            stack.append(expert)
        rank[expert] = rank_N[request]
        sinking = expert
        for depth in range(left):
            if (admits_always and depth == 0) or rank[sinking] > rank[stack[depth]]:
                stack[depth], sinking = sinking, stack[depth]
        stack[left] = sinking
    return found


def _recency(experts_N: Ints) -> list[tuple[int, int]]:
    return [(request, 0) for request in range(len(experts_N))]


def _frequency(experts_N: Ints) -> list[tuple[int, int]]:
    seen: dict[int, int] = {}
    ranks = []
    for request, expert in enumerate(experts_N.tolist()):
        seen[expert] = seen.get(expert, 0) + 1
        ranks.append((seen[expert], request))
    return ranks


def _nearness(experts_N: Ints) -> list[tuple[int, int]]:
    """The sooner its next use, the higher; experts that never come back last of all."""
    following: dict[int, int] = {}
    ranks: list[tuple[int, int]] = []
    for request in range(len(experts_N) - 1, -1, -1):
        expert = int(experts_N[request])
        ranks.append((-following.get(expert, len(experts_N)), 0))
        following[expert] = request
    return ranks[::-1]


_ORDERS: dict[str, tuple[Callable[[Ints], list[tuple[int, int]]], bool]] = {
    "lru": (_recency, True),
    "lfu": (_frequency, True),
    "belady": (_nearness, False),
}
"""Policy → the priority of each request's expert, and whether a missed expert always gets a slot."""


def _static(experts_N: Ints, n_experts: int, hot_E: Ints | None) -> Ints:
    """A hot expert is loaded when it is first asked for and stays."""
    counts_E = np.bincount(experts_N, minlength=n_experts) if hot_E is None else hot_E
    place_E = np.empty(n_experts, dtype=np.int64)
    place_E[np.argsort(-counts_E, kind="stable")] = np.arange(1, n_experts + 1)
    found_N = place_E[experts_N]
    found_N[np.unique(experts_N, return_index=True)[1]] = n_experts + 1
    return found_N
