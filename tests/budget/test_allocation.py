"""The exact allocation of formats under a byte budget, against every possible choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.budget.allocation import Menu, OverBudget, allocate, frontier
from core.errors import BadInput


def menu_of(bytes_GC: np.ndarray, loss_GC: np.ndarray, fixed: int = 0) -> Menu:
    groups = tuple(f"g{i}" for i in range(len(bytes_GC)))
    return Menu(groups, tuple(f"c{i}" for i in range(bytes_GC.shape[1])), bytes_GC, loss_GC, fixed)


@st.composite
def menus(draw: st.DrawFn) -> Menu:
    """Up to 6 groups of up to 4 choices, some of them not allowed; sizes as large as real ones."""
    n_groups, n_choices = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bytes_GC = rng.integers(1, draw(st.sampled_from([10, 10**6, 10**9])), (n_groups, n_choices))
    loss_GC = rng.exponential(10.0 ** draw(st.integers(-8, 2)), (n_groups, n_choices))
    loss_GC[rng.random(loss_GC.shape) < 0.2] = np.nan
    loss_GC[:, 0] = np.nan_to_num(loss_GC[:, 0], nan=1.0)
    return menu_of(bytes_GC, loss_GC, draw(st.integers(0, 1000)))


def every_allocation(menu: Menu) -> list[tuple[int, float]]:
    """Bytes and loss of every allocation there is."""
    found = []
    for picks in itertools.product(range(len(menu.choices)), repeat=len(menu.groups)):
        loss = sum(menu.loss_GC[g, c] for g, c in enumerate(picks))
        if not np.isnan(loss):
            found.append(
                (menu.fixed_bytes + sum(int(menu.bytes_GC[g, c]) for g, c in enumerate(picks)), loss)
            )
    return found


@settings(max_examples=25, deadline=None)
@given(menus(), st.floats(0, 1))
def test_the_allocation_equals_brute_force(menu: Menu, share: float) -> None:
    possible = every_allocation(menu)
    smallest, largest = min(possible)[0], max(possible)[0]
    assert menu.minimum == smallest
    budget = int(smallest + share * (largest - smallest))
    found = allocate(menu, budget)
    best = min(loss for nbytes, loss in possible if nbytes <= budget)
    assert found.bytes <= budget
    assert found.loss == pytest.approx(best, rel=1e-6)
    assert list(found.choice_of) == list(menu.groups)


@settings(max_examples=10, deadline=None)
@given(menus(), st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_a_larger_budget_is_never_worse(menu: Menu, shares: list[float]) -> None:
    spread = int(menu.bytes_GC.max(1).sum()) + menu.fixed_bytes - menu.minimum
    losses = [allocate(menu, menu.minimum + int(share * spread)).loss for share in sorted(shares)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses))


@settings(max_examples=20, deadline=None)
@given(menus())
def test_the_frontier_is_the_hull_of_all_allocations(menu: Menu) -> None:
    hull, possible = frontier(menu), every_allocation(menu)
    rounding = 1e-12 * float(np.nansum(menu.loss_GC))  # the hull is summed from steps, the largest loss first
    for nbytes, loss in zip(hull.bytes_N, hull.loss_N, strict=True):
        best = min(other for size, other in possible if size <= nbytes)
        assert loss == pytest.approx(best, rel=1e-9, abs=rounding)
    for nbytes, loss in possible:
        under = np.interp(nbytes, hull.bytes_N, hull.loss_N)
        assert loss >= under * (1 - 1e-9) - rounding


def test_a_budget_below_the_minimum_says_the_minimum() -> None:
    menu = menu_of(np.array([[1_000_000, 2_000_000], [3_000_000, 5_000_000]]), np.ones((2, 2)), 500_000)
    with pytest.raises(OverBudget, match=r"the minimum is 4\.50 MB") as caught:
        allocate(menu, 4_499_999)
    assert caught.value.minimum == 4_500_000
    assert allocate(menu, 4_500_000).bytes == 4_500_000


def test_a_pin_is_kept_and_paid_for() -> None:
    menu = menu_of(np.array([[1, 4], [1, 4]]), np.array([[9.0, 0.0], [5.0, 0.0]]))
    assert allocate(menu, 5).choice_of == {"g0": "c1", "g1": "c0"}
    assert allocate(menu, 5, pins={"g1": "c1"}).choice_of == {"g0": "c0", "g1": "c1"}
    with pytest.raises(OverBudget, match="with these pins"):
        allocate(menu, 4, pins={"g1": "c1"})


@pytest.mark.parametrize(
    ("pin", "said"), [({"g9": "c0"}, "there are: g0, g1"), ({"g0": "c9"}, "g0 can be c0")]
)
def test_a_pin_that_cannot_be_is_refused(pin: dict[str, str], said: str) -> None:
    menu = menu_of(np.array([[1, 4], [1, 4]]), np.array([[9.0, np.nan], [5.0, 0.0]]))
    with pytest.raises(BadInput, match=said):
        allocate(menu, 5, pins=pin)


def test_a_choice_of_equal_total_is_not_over_budget_by_rounding() -> None:
    """Sizes of 10⁹ bytes in a budget one byte short: the solver's tolerance alone would take it."""
    menu = menu_of(np.array([[1, 10**9], [1, 10**9]]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    found = allocate(menu, 2 * 10**9 - 1)
    assert found.bytes == 10**9 + 1
    assert found.loss == 1.0
