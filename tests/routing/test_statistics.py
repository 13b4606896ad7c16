"""Routing statistics against known answers, other people's code, and slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import normalized_mutual_info_score

from core.routing import statistics

RNG = np.random.default_rng(5)
LOAD_LE = RNG.integers(0, 50, (3, 7))
UNIFORM, ALONE = np.full(8, 5), np.eye(8)[2] * 40


@pytest.mark.parametrize(
    ("measure", "uniform", "alone"),
    [
        (statistics.cv, 0.0, math.sqrt(7)),
        (statistics.max_violation, 0.0, 7.0),
        (statistics.gini, 0.0, 7 / 8),
        (statistics.entropy, math.log(8), 0.0),
        (statistics.effective_experts, 8.0, 1.0),
    ],
)
def test_balance_of_a_uniform_load_and_of_one_expert_alone(measure, uniform: float, alone: float):
    assert measure(UNIFORM) == pytest.approx(uniform, abs=1e-12)
    assert measure(ALONE) == pytest.approx(alone, abs=1e-12)
    assert measure(np.stack([UNIFORM, ALONE])).tolist() == pytest.approx([uniform, alone], abs=1e-12)
    assert np.isnan(measure(np.zeros(8)))


@pytest.mark.parametrize(
    "measure", [statistics.cv, statistics.max_violation, statistics.gini, statistics.entropy]
)
def test_balance_knows_neither_the_order_of_experts_nor_the_amount_of_text(measure):
    order = RNG.permutation(7)
    np.testing.assert_allclose(measure(LOAD_LE[:, order] * 3), measure(LOAD_LE), rtol=1e-12)


def test_gini_is_the_mean_difference_of_all_pairs():
    load = LOAD_LE[0].astype(float)
    slow = sum(abs(a - b) for a in load for b in load) / (2 * len(load) ** 2 * load.mean())
    assert statistics.gini(load) == pytest.approx(slow)


# --- check 12: the auxiliary loss, per layer and pooled -----------------------------------------------

N_EXPERTS, TOP_K, N_TOKENS = 8, 2, 100


def test_balance_loss_is_k_when_uniform_and_e_when_collapsed():
    uniform = statistics.balance_loss(np.full(8, N_TOKENS * TOP_K / 8), np.full(8, N_TOKENS / 8), N_TOKENS)
    assert uniform == pytest.approx(TOP_K)
    collapsed_E = np.isin(np.arange(8), [0, 1])
    collapsed = statistics.balance_loss(collapsed_E * N_TOKENS, collapsed_E * N_TOKENS / 2, N_TOKENS)
    assert collapsed == pytest.approx(N_EXPERTS)


def test_pooling_layers_hides_that_each_of_them_collapsed():
    """Four layers, each collapsed on its own pair of experts: 8.0 in every layer, and a perfect 2.0 when pooled."""
    chosen_LE = np.repeat(np.eye(4), 2, axis=1)
    load_LE, probability_LE = chosen_LE * N_TOKENS, chosen_LE * N_TOKENS / 2
    assert statistics.balance_loss(load_LE, probability_LE, N_TOKENS).tolist() == [8.0] * 4
    assert statistics.pooled_balance_loss(load_LE, probability_LE, N_TOKENS) == pytest.approx(2.0)


def test_balance_loss_is_what_transformers_computes():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_LTE = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))
    shares_LTE = logits_LTE.softmax(-1)
    chosen_LTK = shares_LTE.topk(2, dim=-1).indices
    load_LE = np.stack([np.bincount(chosen.flatten(), minlength=6) for chosen in chosen_LTK.numpy()])
    probability_LE = shares_LTE.sum(1).numpy()
    theirs = load_balancing_loss_func(tuple(logits_LTE), num_experts=6, top_k=2)
    assert statistics.pooled_balance_loss(load_LE, probability_LE, 50) == pytest.approx(
        float(theirs), rel=1e-5
    )
    each = [float(load_balancing_loss_func((logits,), num_experts=6, top_k=2)) for logits in logits_LTE]
    assert statistics.balance_loss(load_LE, probability_LE, 50).tolist() == pytest.approx(each, rel=1e-5)


def test_balance_under_chance_is_what_uniform_routing_shows():
    draws = RNG.multinomial(400, np.full(16, 1 / 16), size=4000)
    assert statistics.cv(draws).mean() == pytest.approx(statistics.balance_under_chance(400, 16), rel=0.03)


# --- pairs --------------------------------------------------------------------------------------------


def chosen(n_tokens: int, n_experts: int, top_k: int) -> np.ndarray:
    """A uniform choice of different experts per token, [T, E] of 0 and 1."""
    rank_TE = RNG.random((n_tokens, n_experts)).argsort(-1)
    return (rank_TE < top_k).astype(np.int64)


def test_lift_and_conditional_of_independent_experts():
    member_TE = chosen(40_000, 8, 2)
    pairs_EE = member_TE.T @ member_TE
    lift_EE = statistics.lift(pairs_EE, len(member_TE))
    off = ~np.eye(8, dtype=bool)
    assert lift_EE[off].mean() == pytest.approx(statistics.lift_by_chance(8, 2), rel=0.01)
    given_EE = statistics.conditional(pairs_EE)
    assert np.diagonal(given_EE).tolist() == [1.0] * 8
    np.testing.assert_allclose(given_EE.sum(1), 2.0)
    assert given_EE[3, 5] == pairs_EE[3, 5] / pairs_EE[3, 3]


def test_an_expert_without_tokens_has_no_lift():
    lift_EE = statistics.lift(np.diag([4, 0]), 4)
    assert lift_EE[0, 0] == 1.0
    assert np.isnan(lift_EE[1]).all()


# --- check 15: what the expert tells of the domain ----------------------------------------------------


def test_information_of_an_oracle_router_is_one_and_gone_after_shuffling_documents():
    n_documents, n_domains = 64, 8
    label_U = np.arange(n_documents) % n_domains
    counts_UE = np.eye(16)[label_U] * RNG.integers(20, 60, (n_documents, 1))
    observed, shuffled, p = statistics.shuffled_information(counts_UE, label_U, draws=200, seed=0)
    assert observed == pytest.approx(1.0)
    assert shuffled.shape == (200,)
    assert shuffled.mean() < 0.25 * observed
    assert p == pytest.approx(1 / 201)


def test_information_of_a_blind_router_is_no_more_than_shuffled():
    label_U = np.repeat(np.arange(4), 16)
    counts_UE = RNG.multinomial(200, np.full(8, 1 / 8), size=64)
    observed, shuffled, p = statistics.shuffled_information(counts_UE, label_U, draws=300, seed=1)
    assert observed < 0.02
    assert shuffled.min() <= observed <= shuffled.max()
    assert p > 0.05


def test_shuffling_documents_and_not_tokens_keeps_a_bursty_router_honest():
    """Each document has a favourite expert for no reason: tokens shuffled would call that significant."""
    label_U = np.repeat(np.arange(4), 4)
    counts_UE = np.eye(8)[RNG.integers(0, 8, 16)] * 100
    observed, shuffled, p = statistics.shuffled_information(counts_UE, label_U, draws=500, seed=2)
    token_noise = (
        (4 - 1) * (8 - 1) / (2 * counts_UE.sum())
    )  # what Miller's bias of 1,600 free tokens would be
    assert observed > 20 * token_noise
    assert p > 0.05
    assert shuffled.mean() == pytest.approx(observed, abs=0.2)


def test_normalized_information_is_scikit_learns():
    domain_T, expert_T = RNG.integers(0, 4, 500), RNG.integers(0, 6, 500)
    expert_T[domain_T == 1] = 3
    counts_DE = np.zeros((4, 6), dtype=np.int64)
    np.add.at(counts_DE, (domain_T, expert_T), 1)
    theirs = normalized_mutual_info_score(domain_T, expert_T, average_method="arithmetic")
    assert statistics.normalized_mutual_information(counts_DE) == pytest.approx(theirs)
    both = np.stack([counts_DE, np.ones((4, 6))])
    assert statistics.normalized_mutual_information(both) == pytest.approx([theirs, 0.0], abs=1e-12)


def test_information_of_one_cell_is_undefined():
    assert np.isnan(statistics.normalized_mutual_information([[5, 0], [0, 0]]))


def test_the_permutation_check_can_fail():
    """A control that shuffles nothing finds the observed value every time, and p = 1."""

    class NoShuffle:
        def permutation(self, n: int) -> np.ndarray:
            return np.arange(n)

    label_U = np.repeat(np.arange(4), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: NoShuffle())
        _, _, p = statistics.shuffled_information(np.eye(4)[label_U] * 9, label_U, draws=50, seed=0)
    assert p == 1.0


# --- domains, tokens ----------------------------------------------------------------------------------


def test_jensen_shannon_is_scipys_squared_distance():
    a, b = LOAD_LE[0], LOAD_LE[1]
    assert statistics.jensen_shannon(a, b) == pytest.approx(jensenshannon(a, b, base=2) ** 2)
    assert statistics.jensen_shannon(a, a * 4) == pytest.approx(0.0, abs=1e-12)
    assert statistics.jensen_shannon([3, 0, 0], [0, 1, 1]) == pytest.approx(1.0)
    matrix_LL = statistics.jensen_shannon(LOAD_LE[:, None], LOAD_LE[None])
    np.testing.assert_allclose(matrix_LL, matrix_LL.T, atol=1e-12)


def test_specialisation_is_the_share_of_a_domains_tokens():
    share_DE = statistics.specialisation([[30, 10], [5, 15]], [40, 10])
    assert share_DE.tolist() == [[0.75, 0.25], [0.5, 1.5]]


def test_token_purity_asks_only_tokens_seen_often_enough():
    table_VE = [[10, 0], [5, 5], [3, 0], [12, 4]]
    assert statistics.token_purity(table_VE) == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert np.isnan(statistics.token_purity(table_VE, min_count=100))


def test_repetition_by_hand():
    assert statistics.repetition([[1, 1, 2, 2, 2], [0, 1, 0, 1, 0]]).tolist() == [0.75, 0.0]


# --- checks 14 and 16: two routings -------------------------------------------------------------------


def test_saturation_with_itself_is_one_and_of_random_routers_k_over_e():
    ids = np.argsort(RNG.random((60_000, 16)))[:, :3]
    other = np.argsort(RNG.random((60_000, 16)))[:, :3]
    assert statistics.overlap_at_k(ids, ids[:, ::-1]).tolist() == [1.0] * len(ids)
    overlap_T = statistics.overlap_at_k(ids, other)
    mean, variance = statistics.overlap_by_chance(16, 3)
    assert mean == 3 / 16
    assert overlap_T.mean() == pytest.approx(mean, rel=0.02)
    assert overlap_T.var() == pytest.approx(variance, rel=0.03)


def test_overlap_by_hand():
    a, b = [[0, 1], [2, 3], [4, -1], [-1, -1]], [[1, 5], [3, 2], [-1, 4], [1, 2]]
    found = statistics.overlap_at_k(a, b)
    assert found[:3].tolist() == [0.5, 1.0, 1.0]
    assert np.isnan(found[3])


def test_weight_drift_counts_what_moved():
    a = statistics.dense_weights([[0, 1], [2, -1]], [[0.75, 0.25], [1.0, 0.0]], 4)
    b = statistics.dense_weights([[1, 3], [2, 0]], [[0.5, 0.5], [0.5, 0.5]], 4)
    assert a.tolist() == [[0.75, 0.25, 0, 0], [0, 0, 1, 0]]
    assert statistics.weight_drift(a, b).tolist() == [0.75, 0.5]
    assert statistics.weight_drift(a, a).tolist() == [0.0, 0.0]


def test_dense_weights_add_up_where_one_expert_has_two_slots():
    assert statistics.dense_weights([[1, 1]], [[0.25, 0.5]], 2).tolist() == [[0.0, 0.75]]
