"""Expert placement: EPLB's known answers, and every layout against brute force where that is possible."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import BadInput
from core.routing.placement import imbalance, in_order, packed, placement, redundant_counts, replicas

loads = st.lists(st.integers(0, 1000), min_size=2, max_size=12)


@given(loads, st.integers(0, 12))
def test_slots_are_all_given_out_and_no_expert_is_lost(load, redundant):
    copies = replicas(load, len(load) + redundant)
    assert copies.sum() == len(load) + redundant
    assert copies.min() >= 1


@given(loads, st.integers(0, 11))
def test_one_more_copy_never_makes_the_busiest_slot_busier(load, redundant):
    each = [np.max(np.array(load) / replicas(load, len(load) + r)) for r in (redundant, redundant + 1)]
    assert each[1] <= each[0]


@given(loads, st.integers(1, 6))
def test_copies_are_spread_as_well_as_any_spread_could(load, redundant):
    """Greedy copying minimises the busiest slot: against every way to give the copies out, for few of them."""
    load, redundant = load[:4], min(redundant, 4)
    ways = (
        1 + np.bincount(choice, minlength=len(load)) for choice in product(range(len(load)), repeat=redundant)
    )
    best = min(float(np.max(np.array(load) / way)) for way in ways)
    assert np.max(np.array(load) / replicas(load, len(load) + redundant)) == pytest.approx(best)


@given(loads)
def test_one_device_is_always_even(load):
    assert imbalance(load, *placement(load, 1, 3)) == pytest.approx(1.0)


@pytest.mark.parametrize(("n_devices", "redundant"), [(1, 0), (2, 0), (4, 4), (8, 8)])
def test_uniform_load_is_even_on_any_number_of_devices(n_devices, redundant):
    assert imbalance([5] * 8, *placement([5] * 8, n_devices, redundant)) == pytest.approx(1.0)


def test_every_device_holds_as_many_slots():
    device_S = packed([9, 1, 1, 1, 1, 1], 3)
    assert np.bincount(device_S).tolist() == [2, 2, 2]


def test_one_expert_that_has_everything_needs_copies():
    load = [12, 0, 0, 0]
    assert imbalance(load, *in_order(4, 4)) == 4.0
    assert imbalance(load, *placement(load, 4, 0)) == 4.0
    # Five copies of 12 / 5 on four devices: one device holds two of them, 4.8 against a mean of 3.
    assert imbalance(load, *placement(load, 4, 4)) == pytest.approx(1.6)


def test_no_load_is_even():
    assert imbalance([0, 0], *in_order(2, 2)) == 1.0


def test_counts_that_do_not_divide_are_refused_with_the_number_that_does():
    assert redundant_counts(16, 4, most=8) == [0, 4, 8]
    with pytest.raises(BadInput, match="allow 5 copies"):
        redundant_counts(16, 7, most=4)
    with pytest.raises(ValueError, match="do not divide"):
        packed([1, 2, 3], 2)
    with pytest.raises(ValueError, match="fewer than"):
        replicas([1, 2, 3], 2)
