"""A format for every group of weights: the smallest summed loss that a byte budget allows, exactly.

Groups share a choice (q, k and v; gate and up; the experts of a layer; a tied pair). Each choice of a group has bytes
and a loss; losses are taken to add up. That is a multiple-choice knapsack: min Σ loss · x, Σ bytes · x ≤ budget, one
choice per group, solved as an integer program by HiGHS. Plain numpy and scipy: a page may ask it at every move of a
slider. Knows nothing of models, files or where losses come from.

Legend: G groups, C choices, N points of the frontier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
EXACTLY = 1e-9
"""Relative gap to the proved bound at which the search ends; HiGHS' own 1e-6, absolute, is below it as losses are scaled."""


class OverBudget(BadInput):
    """A budget below the smallest possible model; ``minimum`` is in bytes."""

    def __init__(self, message: str, minimum: int) -> None:
        super().__init__(message)
        self.minimum = minimum


@dataclass(frozen=True, eq=False)
class Menu:
    """What may be chosen, and what each choice takes and costs."""

    groups: tuple[str, ...]
    choices: tuple[str, ...]
    bytes_GC: Ints
    loss_GC: Floats
    """Any unit that adds up; NaN where a group cannot take a choice."""
    fixed_bytes: int = 0
    """What is stored whatever is chosen: norms, biases, routers, the file's header."""

    def __post_init__(self) -> None:
        shape = (len(self.groups), len(self.choices))
        assert self.bytes_GC.shape == self.loss_GC.shape == shape, f"a menu is groups by choices, {shape}"
        empty_G = ~self.allowed_GC.any(axis=1)
        assert not empty_G.any(), f"no choice is left for {self.groups[int(empty_G.argmax())]}"

    @property
    def allowed_GC(self) -> NDArray[np.bool_]:
        """Where there is a choice."""
        return ~np.isnan(self.loss_GC)

    @property
    def minimum(self) -> int:
        """Bytes of the smallest model."""
        smallest_G = np.where(self.allowed_GC, self.bytes_GC, np.iinfo(np.int64).max).min(1)
        return int(smallest_G.sum()) + self.fixed_bytes

    def only(self, mask_GC: NDArray[np.bool_], pins: Mapping[str, str]) -> Menu | None:
        """The menu with only these cells; None where a group, or one's pin, would be left with nothing."""
        allowed_GC = self.allowed_GC & mask_GC
        kept = [allowed_GC[self.groups.index(g), self.choices.index(c)] for g, c in pins.items()]
        if not allowed_GC.any(1).all() or not all(kept):
            return None
        return replace(self, loss_GC=np.where(allowed_GC, self.loss_GC, np.nan))

    def pinned(self, pins: Mapping[str, str]) -> Menu:
        """The menu with these groups' choices made. Raises ``BadInput`` for a group or choice that is not on it."""
        loss_GC = self.loss_GC.copy()
        for group, choice in pins.items():
            if group not in self.groups:
                raise BadInput(f"pin {group!r}: there is no such group; there are: {', '.join(self.groups)}")
            row = self.groups.index(group)
            possible = [c for c, free in zip(self.choices, self.allowed_GC[row], strict=True) if free]
            if choice not in possible:
                raise BadInput(f"pin {group}:{choice}: {group} can be {', '.join(possible)}")
            kept = loss_GC[row, self.choices.index(choice)]
            loss_GC[row] = np.nan
            loss_GC[row, self.choices.index(choice)] = kept
        return replace(self, loss_GC=loss_GC)


@dataclass(frozen=True)
class Allocation:
    """One choice per group, with what it takes and costs."""

    choice_of: Mapping[str, str]
    """Group → choice, in the menu's order."""
    bytes: int
    """Fixed bytes included."""
    loss: float


@dataclass(frozen=True, eq=False)
class Frontier:
    """The lower convex hull of size and loss over all allocations: each point is the exact optimum of its size.

    Between two points there can be allocations above the hull; ``allocate`` finds them.
    """

    bytes_N: Ints
    """Ascending."""
    loss_N: Floats
    """Descending."""

    def bound(self, budget: int) -> float:
        """No allocation in ``budget`` bytes has a smaller loss; infinite below the smallest."""
        if budget < self.bytes_N[0]:
            return float("inf")
        return float(np.interp(budget, self.bytes_N, self.loss_N))


def allocate(menu: Menu, budget: int, *, pins: Mapping[str, str] | None = None) -> Allocation:
    """The allocation of least summed loss in ``budget`` bytes; of equal losses any.

    Raises ``OverBudget`` (a ``BadInput``) saying the minimum, ``BadInput`` for a pin that cannot be.
    """
    menu = menu.pinned(pins or {})
    if budget < menu.minimum:
        pinned = " with these pins" if pins else ""
        raise OverBudget(
            f"a budget of {budget / 1e6:.2f} MB cannot be met{pinned}: the minimum is {menu.minimum / 1e6:.2f} MB; "
            "raise the budget, allow smaller formats, or prune first",
            menu.minimum,
        )
    return _allocation(menu, _solve(menu, budget))


def frontier(menu: Menu, *, pins: Mapping[str, str] | None = None) -> Frontier:
    """The hull of size against loss, in microseconds per group: the curve under a budget's slider.

    Each group's own hull is walked from its smallest choice up; the steps of all groups, steepest first, are the hull
    of the sum (Sinha and Zoltners, Operations Research 27(3), 1979).
    """
    menu = menu.pinned(pins or {})
    steps: list[tuple[float, int, float]] = []
    nbytes, loss = menu.fixed_bytes, 0.0
    for row in range(len(menu.groups)):
        hull = _hull(menu, row)
        nbytes += hull[0][0]
        loss += hull[0][1]
        for (less, worse), (more, better) in pairwise(hull):
            steps.append(((better - worse) / (more - less), more - less, better - worse))
    steps.sort()
    bytes_N = nbytes + np.cumsum([0, *(step[1] for step in steps)])
    loss_N = loss + np.cumsum([0.0, *(step[2] for step in steps)])
    return Frontier(bytes_N.astype(np.int64), loss_N)


def _hull(menu: Menu, row: int) -> list[tuple[int, float]]:
    """Lower convex hull of one group's choices: bytes ascending, loss descending, slopes rising."""
    points = sorted(
        (int(b), float(x))
        for b, x, free in zip(
            menu.bytes_GC[row], menu.loss_GC[row], menu.allowed_GC[row], strict=True
        )
        if free
    )  # fmt: skip
    hull: list[tuple[int, float]] = []
    for nbytes, loss in points:
        if hull and loss >= hull[-1][1]:
            continue  # larger and no better
        while len(hull) > 1 and _cross(hull[-2], hull[-1], (nbytes, loss)) <= 0:
            hull.pop()
        hull.append((nbytes, loss))
    return hull


def _cross(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> float:
    """Positive where ``b`` lies below the line from ``a`` to ``c``."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _solve(menu: Menu, budget: int) -> NDArray[np.int64]:
    """The chosen column of each group [G].

    A solver keeps a constraint to within a tolerance: what it finds is checked in whole bytes, and a choice that is
    over budget by that tolerance is forbidden and the search repeated.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    group_K, choice_K = np.nonzero(menu.allowed_GC)
    loss_K, bytes_K = menu.loss_GC[group_K, choice_K], menu.bytes_GC[group_K, choice_K]
    one_each_GK = (np.arange(len(menu.groups))[:, None] == group_K).astype(float)
    room = budget - menu.fixed_bytes
    scale = float(np.abs(loss_K).max()) or 1.0
    constraints = [
        LinearConstraint(one_each_GK, 1, 1),
        LinearConstraint(bytes_K[None] / max(1, room), -np.inf, room / max(1, room)),
    ]
    while True:
        found = milp(
            loss_K * (1e4 / scale),
            integrality=np.ones(len(loss_K)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": EXACTLY},
        )
        assert found.x is not None, f"a budget above the minimum has an allocation: {found.message}"
        taken_K = found.x > 0.5
        if int(bytes_K[taken_K].sum()) <= room:
            chosen_G: NDArray[np.int64] = np.empty(len(menu.groups), np.int64)
            chosen_G[group_K[taken_K]] = choice_K[taken_K]
            return chosen_G
        constraints.append(LinearConstraint(taken_K[None].astype(float), -np.inf, len(menu.groups) - 1))


def _allocation(menu: Menu, chosen_G: NDArray[np.int64]) -> Allocation:
    rows = np.arange(len(menu.groups))
    return Allocation(
        {group: menu.choices[choice] for group, choice in zip(menu.groups, chosen_G, strict=True)},
        int(menu.bytes_GC[rows, chosen_G].sum()) + menu.fixed_bytes,
        float(menu.loss_GC[rows, chosen_G].sum()),
    )
