"""Numbers about routing, from counts alone: balance, dependence, overlap. Pure numpy; knows no model.

Every function works on the last axes and keeps those before, so one call serves all layers. Entropies are in nats.
What is 0/0 (an expert without tokens, a layer without load) is NaN, and never 0.

Legend: ``E`` experts, ``D`` domains, ``T`` tokens, ``K`` slots, ``V`` vocabulary, ``U`` documents, ``R`` draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _ratio(above: Floats, below: Floats) -> Floats:
    """above / below, NaN where below is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(below == 0, np.nan, above / below), dtype=np.float64)


def shares(load_E: ArrayLike) -> Floats:
    """Each expert's share of its layer's load; sums to 1."""
    load = _floats(load_E)
    return _ratio(load, load.sum(-1, keepdims=True))


# --- balance of one layer -----------------------------------------------------------------------------


def cv(load_E: ArrayLike) -> Floats:
    """Coefficient of variation, σ(load) / mean(load): 0 for a uniform load, √(E − 1) for one expert alone."""
    load = _floats(load_E)
    return _ratio(load.std(-1), load.mean(-1))


def max_violation(load_E: ArrayLike) -> Floats:
    """(max load − mean load) / mean load (MaxVio, arXiv 2408.15664): 0 uniform, E − 1 for one expert alone."""
    load = _floats(load_E)
    return _ratio(load.max(-1) - load.mean(-1), load.mean(-1))


def gini(load_E: ArrayLike) -> Floats:
    """Gini coefficient: 0 for a uniform load, 1 − 1/E for one expert alone."""
    ranked = np.sort(_floats(load_E), axis=-1)
    n = ranked.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    return _ratio((ranked * weights).sum(-1), n * ranked.sum(-1))


def entropy(load_E: ArrayLike) -> Floats:
    """Entropy of the load's shares in nats: ln E uniform, 0 for one expert alone."""
    share = shares(load_E)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(share == 0, 0.0, -share * np.log(share))
    return np.asarray(terms.sum(-1) + 0.0, dtype=np.float64)


def effective_experts(load_E: ArrayLike) -> Floats:
    """exp(entropy): how many equally loaded experts would be as spread as this."""
    return np.asarray(np.exp(entropy(load_E)), dtype=np.float64)


def balance_loss(load_E: ArrayLike, probability_E: ArrayLike, n_tokens: int) -> Floats:
    """E · Σ_e (load_e / T) · (Σ_t p_te / T), the Switch auxiliary loss (arXiv 2101.03961, eq. 4) for top-k.

    k when load and router are uniform; E when all tokens choose the same k experts with all of the router's mass.
    Layers must not be pooled before: see ``pooled_balance_loss``.
    """
    load, probability = _floats(load_E), _floats(probability_E)
    return np.asarray(load.shape[-1] * (load * probability).sum(-1) / n_tokens**2, dtype=np.float64)


def pooled_balance_loss(load_LE: ArrayLike, probability_LE: ArrayLike, n_tokens: int) -> float:
    """The same over all layers' tokens as if they were one layer's, as transformers' ``load_balancing_loss_func`` does.

    It cannot see layers that collapse on different experts: shown beside ``balance_loss`` to say so.
    """
    return float(balance_loss(_floats(load_LE).mean(0), _floats(probability_LE).mean(0), n_tokens))


def balance_under_chance(n_choices: ArrayLike, n_experts: int, *, top_k: int = 1) -> Floats:
    """CV that a perfectly uniform router would still show on so many choices: √((E − k) / choices).

    The k choices of one token are k different experts, so they vary less than as many choices of their own.
    """
    return np.asarray(np.sqrt((n_experts - top_k) / _floats(n_choices)), dtype=np.float64)


# --- experts together ---------------------------------------------------------------------------------


def conditional(coactivation_EE: ArrayLike) -> Floats:
    """P(j | i) = C_ij / C_ii: of the tokens of expert i (row), the share that j computed too. Diagonal 1."""
    pairs = _floats(coactivation_EE)
    return _ratio(pairs, np.diagonal(pairs, axis1=-2, axis2=-1)[..., :, None])


def lift(coactivation_EE: ArrayLike, n_tokens: int) -> Floats:
    """C_ij · T / (C_ii · C_jj): 1 where two experts are chosen together as often as if independent.

    Slots of one token differ, so without any preference the expected lift is not 1 but ``lift_by_chance``.
    """
    pairs = _floats(coactivation_EE)
    load = np.diagonal(pairs, axis1=-2, axis2=-1)
    return _ratio(pairs * n_tokens, load[..., :, None] * load[..., None, :])


def lift_by_chance(n_experts: int, top_k: int) -> float:
    """Lift of two different experts under a uniform choice of k different ones: (k − 1) E / (k (E − 1))."""
    return (top_k - 1) * n_experts / (top_k * (n_experts - 1))


# --- experts and labels -------------------------------------------------------------------------------


def mutual_information(counts_DE: ArrayLike) -> Floats:
    """Mutual information of row and column in nats, from their joint counts [..., D, E]."""
    joint = _floats(counts_DE)
    row, column = entropy(joint.sum(-1)), entropy(joint.sum(-2))
    both = entropy(joint.reshape(*joint.shape[:-2], -1))
    return np.asarray(np.maximum(0.0, row + column - both), dtype=np.float64)


def normalized_mutual_information(counts_DE: ArrayLike) -> Floats:
    """MI / mean of both entropies (Strehl & Ghosh 2002, arithmetic mean): 0 independent, 1 one-to-one; in [0, 1].

    NaN where neither varies, since there is nothing to tell. Few samples alone make it positive: hold it against
    ``shuffled_information``.
    """
    joint = _floats(counts_DE)
    mean = (entropy(joint.sum(-1)) + entropy(joint.sum(-2))) / 2
    return _ratio(mutual_information(joint), mean)


def shuffled_information(
    counts_UE: ArrayLike, label_U: ArrayLike, *, draws: int, seed: int
) -> tuple[Floats, Floats, Floats]:
    """Normalized mutual information of label and expert, observed and under ``draws`` shuffles, and its p-value.

    Labels are shuffled among *documents* and never among tokens: tokens of one document resemble each other, and
    shuffling them would make any router look specialised. ``counts_UE`` [..., U, E] holds each document's choices.
    Returns observed [...], shuffled [R, ...], and p = (1 + #{shuffled ≥ observed}) / (1 + R) (Phipson & Smyth 2010).
    """
    counts = _floats(counts_UE)
    labels = np.unique(np.asarray(label_U), return_inverse=True)[1]
    member_DU = np.eye(labels.max() + 1)[:, labels]
    generator = np.random.default_rng(seed)
    observed = normalized_mutual_information(member_DU @ counts)
    orders = (generator.permutation(len(labels)) for _ in range(draws))
    shuffled = np.stack([normalized_mutual_information(member_DU[:, order] @ counts) for order in orders])
    # Equal groupings differ by rounding, and count as reached.
    reached = (shuffled >= observed - 1e-12).sum(0)
    return observed, shuffled, np.asarray((1 + reached) / (1 + draws), dtype=np.float64)


def specialisation(load_DE: ArrayLike, n_tokens_D: ArrayLike) -> Floats:
    """Share of a domain's tokens that each expert computes, N_{e,D} / N_D (OLMoE, arXiv 2409.02060); uniform is k / E."""
    return _ratio(_floats(load_DE), np.broadcast_to(_floats(n_tokens_D)[..., None], np.shape(load_DE)))


def jensen_shannon(load_a: ArrayLike, load_b: ArrayLike) -> Floats:
    """Jensen-Shannon divergence of two loads' shares, in bits: 0 equal, 1 without any expert in common."""
    a, b = shares(load_a), shares(load_b)
    a, b = np.broadcast_arrays(a, b)
    nats = entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2
    return np.asarray(np.maximum(0.0, nats / np.log(2)), dtype=np.float64)


def token_purity(table_VE: ArrayLike, *, min_count: int = 10) -> Floats:
    """Mean over tokens of the largest P(expert | token), tokens seen at least ``min_count`` times (OLMoE's measure).

    ``table_VE`` [..., V, E] counts first choices, or all k; then 1 / k is its highest value.
    """
    table = _floats(table_VE)
    total = table.sum(-1)
    kept = total >= min_count
    best = np.where(kept, table.max(-1) / np.maximum(total, 1), 0.0)
    return _ratio(best.sum(-1), kept.sum(-1).astype(np.float64))


def repetition(first_T: ArrayLike) -> Floats:
    """Share of tokens whose first expert is the previous token's too (Mixtral, Table 5); by chance Σ share²."""
    first = np.asarray(first_T)
    return np.asarray((first[..., 1:] == first[..., :-1]).mean(-1), dtype=np.float64)


# --- two routings of the same tokens ------------------------------------------------------------------


def overlap_at_k(experts_a_TK: ArrayLike, experts_b_TK: ArrayLike) -> Floats:
    """|S_a ∩ S_b| / k of each token, k the slots of a that reach an expert; NaN where a has none.

    Order does not matter, -1 never matches. Mean over tokens of a checkpoint against the last one is its router
    saturation (OLMoE); 1 − overlap is the routing drift.
    """
    a, b = np.asarray(experts_a_TK), np.asarray(experts_b_TK)
    reached = a >= 0
    common = ((a[..., :, None] == b[..., None, :]).any(-1) & reached).sum(-1)
    return _ratio(common.astype(np.float64), reached.sum(-1).astype(np.float64))


def overlap_by_chance(n_experts: int, top_k: int) -> tuple[float, float]:
    """Mean and variance of ``overlap_at_k`` of two uniform independent choices: hypergeometric.

    Mean k / E, variance (k / E) (1 − k / E) (E − k) / (k (E − 1)).
    """
    share = top_k / n_experts
    return share, share * (1 - share) * (n_experts - top_k) / (top_k * (n_experts - 1))


def dense_weights(experts_TK: ArrayLike, weights_TK: ArrayLike, n_experts: int) -> NDArray[np.float32]:
    """Routing weights as a row over all experts [..., T, E], 0 where an expert was not chosen."""
    experts, weights = np.asarray(experts_TK), np.asarray(weights_TK, dtype=np.float32)
    spread = np.zeros((*experts.shape[:-1], n_experts + 1), dtype=np.float32)
    slots = np.where(experts < 0, n_experts, experts).astype(np.int64)
    for slot in range(slots.shape[-1]):
        # One slot at a time, so that an expert standing in two slots gets both weights.
        column = slots[..., slot : slot + 1]
        added = np.take_along_axis(spread, column, -1) + weights[..., slot : slot + 1]
        np.put_along_axis(spread, column, added, -1)
    return spread[..., :n_experts]


def weight_drift(weights_a_TE: ArrayLike, weights_b_TE: ArrayLike) -> Floats:
    """½ ‖g_a − g_b‖₁ of each token: the routing weight that moved to other experts; at most 1 where weights sum to 1."""
    return np.asarray(np.abs(_floats(weights_a_TE) - _floats(weights_b_TE)).sum(-1) / 2, dtype=np.float64)
