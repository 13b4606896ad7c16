"""The expert cache: every policy against its definition, and the answers known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.routing.cache import (
    POLICIES,
    Policy,
    Requests,
    hit_rates,
    knee,
    slots_needed,
    uniform_experts_touched,
)
from tests.references import slow_cache

E = 5
TRACES = st.lists(st.integers(0, E - 1), min_size=1, max_size=40)


def needed(policy: Policy, trace: list[int], n_experts: int = E) -> np.ndarray:
    return slots_needed(policy, np.array(trace, dtype=np.int64), n_experts)


@pytest.mark.parametrize("policy", POLICIES)
@given(trace=TRACES)
def test_every_capacity_equals_a_cache_simulated_alone(policy: Policy, trace: list[int]) -> None:
    hot = sorted(range(E), key=lambda expert: (-trace.count(expert), expert))
    found = needed(policy, trace)
    for slots in range(E + 1):
        assert (found <= slots).tolist() == slow_cache.hits(policy, trace, slots, hot), slots


@settings(max_examples=50)
@given(trace=st.lists(st.integers(0, 3), min_size=1, max_size=12), slots=st.integers(0, 4))
def test_no_choice_of_residents_beats_belady(trace: list[int], slots: int) -> None:
    assert int((needed("belady", trace, 4) <= slots).sum()) == slow_cache.most_hits(tuple(trace), slots)


@given(trace=TRACES)
def test_belady_hits_at_least_as_often_as_the_others(trace: list[int]) -> None:
    best_C = hit_rates(needed("belady", trace), E)
    for policy in POLICIES:
        rates_C = hit_rates(needed(policy, trace), E)
        assert (rates_C <= best_C + 1e-12).all(), policy
        assert (np.diff(rates_C) >= 0).all(), "a larger cache never hits less"
        assert rates_C[0] == 0


@pytest.mark.parametrize("policy", POLICIES)
@given(trace=TRACES)
def test_with_room_for_all_only_first_requests_miss(policy: Policy, trace: list[int]) -> None:
    found = needed(policy, trace)
    first = [expert not in trace[:index] for index, expert in enumerate(trace)]
    assert (found > E).tolist() == first


@pytest.mark.parametrize("n_experts", [3, 8])
def test_lru_never_hits_a_cycle_longer_than_itself(n_experts: int) -> None:
    """k = E with fewer slots than experts: each is let go just before it is wanted again."""
    every_token_wants_all = Requests.of(np.tile(np.arange(n_experts), (20, 1)), tokens_per_step=1)
    rates_C = hit_rates(slots_needed("lru", every_token_wants_all.experts_N, n_experts), n_experts)
    assert (rates_C[:n_experts] == 0).all()
    assert rates_C[n_experts] == pytest.approx(19 / 20)
    assert knee(rates_C)[1] == 0
    belady_C = hit_rates(slots_needed("belady", every_token_wants_all.experts_N, n_experts), n_experts)
    assert (np.diff(belady_C) > 0).all(), "who knows the future keeps what fits"


def test_lru_hits_as_many_of_uniform_requests_as_it_has_slots() -> None:
    """k = 1, independent and uniform: the share of experts held is the share of hits (C/E)."""
    n_experts, n = 16, 40_000
    trace_N = np.random.default_rng(0).integers(0, n_experts, n)
    rates_C = hit_rates(slots_needed("lru", trace_N, n_experts), n_experts)
    exact_C = np.arange(n_experts + 1) / n_experts
    sigma_C = np.sqrt(exact_C * (1 - exact_C) / n)
    assert (np.abs(rates_C - exact_C) <= 4 * sigma_C + n_experts / n).all()
    assert knee(rates_C)[1] < 0.02, "uniform routing has no knee"


def test_the_knee_is_where_the_working_set_fits() -> None:
    """Nine requests in ten go to 4 of 32 experts."""
    generator = np.random.default_rng(1)
    trace_N = np.where(
        generator.random(5000) < 0.9, generator.integers(0, 4, 5000), generator.integers(4, 32, 5000)
    )
    slots, above = knee(hit_rates(slots_needed("static", trace_N, 32), 32))
    assert slots == 4
    assert above > 0.7


def test_a_static_cache_set_up_by_another_trace_holds_what_was_hot_there() -> None:
    trace_N = np.array([0, 0, 1, 1, 2, 2])
    hot_E = np.array([0, 1, 5])
    assert slots_needed("static", trace_N, 3, hot_E=hot_E).tolist() == [4, 3, 4, 2, 4, 1]


def test_a_step_asks_once_for_each_wanted_expert() -> None:
    experts_TK = np.array([[3, 1], [1, 0], [2, 2], [-1, -1], [0, -1]])
    by_token = Requests.of(experts_TK, tokens_per_step=1)
    assert by_token.experts_N.tolist() == [1, 3, 0, 1, 2, 0]
    assert by_token.step_N.tolist() == [0, 0, 1, 1, 2, 4]
    whole = Requests.of(experts_TK, tokens_per_step=5)
    assert whole.experts_N.tolist() == [0, 1, 2, 3]
    both = whole.then(by_token)
    assert both.n_steps == 6
    assert both.per_step(np.ones(10, bool)).tolist() == [4, 2, 2, 1, 0, 1]
    assert Requests.of(experts_TK[:0], tokens_per_step=1).n_steps == 0


def test_experts_touched_by_tokens_that_choose_at_random() -> None:
    assert uniform_experts_touched(16, 2, np.array([0, 1])).tolist() == pytest.approx([0, 2])
    assert float(uniform_experts_touched(16, 2, np.array([8]))[0]) / 16 == pytest.approx(0.66, abs=0.01)
    generator = np.random.default_rng(0)
    drawn = [len({e for _ in range(8) for e in generator.choice(16, 2, replace=False)}) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(float(uniform_experts_touched(16, 2, np.array([8]))[0]), abs=0.1)
