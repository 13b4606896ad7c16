"""Clusters, groups and averages of experts: against the slow versions, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.errors import CannotCompress
from core.routing.merging import (
    Merge,
    agglomerate,
    average,
    column_cosine,
    distances,
    greedy_groups,
    in_router_groups,
    mean_cosine,
)
from core.routing.surgery import ExpertWeights
from tests.references.slow_merging import slow_clusters, slow_groups

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("linkage", ["average", "single"])
@pytest.mark.parametrize("n_clusters", [1, 2, 5, 8, 9])
def test_clusters_are_those_of_joining_the_nearest_again_and_again(linkage: str, n_clusters: int) -> None:
    distance_EE = distances(RANDOM.normal(size=(9, 4)))
    assert agglomerate(distance_EE, n_clusters, linkage) == slow_clusters(distance_EE, n_clusters, linkage)


def test_the_two_linkages_differ_where_a_chain_of_small_steps_is_long() -> None:
    chain = np.array([[0.0], [1.0], [2.1], [3.3], [20.0], [22.0]])
    single = agglomerate(distances(chain), 3, "single")
    assert single == [(0, 1, 2, 3), (4,), (5,)]
    assert agglomerate(distances(chain), 3, "average") == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize("linkage", ["average", "single"])
def test_ties_never_give_fewer_clusters_than_asked_for(linkage: str) -> None:
    same = np.ones((6, 3))
    for n_clusters in range(1, 7):
        clusters = agglomerate(distances(same), n_clusters, linkage)
        assert len(clusters) == n_clusters
        assert sorted(e for cluster in clusters for e in cluster) == list(range(6))


@pytest.mark.parametrize("linkage", ["average", "single"])
def test_equal_outputs_are_joined_first(linkage: str) -> None:
    rows_ED = RANDOM.normal(size=(6, 5))
    rows_ED[4] = rows_ED[1]
    assert (1, 4) in agglomerate(distances(rows_ED), 5, linkage)


@pytest.mark.parametrize(("n_groups", "largest"), [(3, 4), (4, 3), (10, 2), (5, 16)])
def test_groups_are_those_of_the_greedy_written_out(n_groups: int, largest: int) -> None:
    n = 12 if n_groups < 10 else 20
    similarity_EE = RANDOM.normal(size=(n, n))
    saliency_E = RANDOM.random(n)
    groups = greedy_groups(similarity_EE, saliency_E, n_groups, largest)
    assert [list(group) for group in groups] == slow_groups(similarity_EE, saliency_E, n_groups, largest)
    assert {group[0] for group in groups} == set(np.argsort(-saliency_E)[:n_groups])
    assert sorted(e for group in groups for e in group) == list(range(n))


def test_most_groups_stay_single_when_groups_may_be_large() -> None:
    groups = greedy_groups(RANDOM.random((32, 32)), RANDOM.random(32), 24, 16)
    assert sorted(map(len, groups)) == [1] * 23 + [9]


def test_groups_too_small_for_all_experts_are_refused() -> None:
    with pytest.raises(
        CannotCompress, match=r"3 groups of at most 2 experts cannot hold 7; choose a larger group"
    ):
        greedy_groups(np.eye(7), np.arange(7.0), 3, 2)


def test_shares_follow_the_load_and_the_heaviest_member_is_kept() -> None:
    load_E = np.array([5.0, 0.0, 15.0, 0.0])
    assert Merge.of((0, 2), load_E) == Merge(2, (2, 0), (0.75, 0.25))
    assert Merge.of((0, 2), load_E, kept=0) == Merge(0, (0, 2), (0.25, 0.75))
    # Two that no token chose: nothing speaks for either.
    assert Merge.of((1, 3), load_E) == Merge(1, (1, 3), (0.5, 0.5))
    assert Merge.of((3,), load_E) == Merge(3, (3,), (1.0,))


def expert(seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_ID": (6, 4), "up_ID": (6, 4), "down_DI": (4, 6)}
    return ExpertWeights(**{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def test_the_average_is_the_weighted_sum_of_every_part_and_of_one_is_itself() -> None:
    first, second = expert(1), expert(2)
    merged = average([first, second], [0.25, 0.75])
    for name in ("gate_ID", "up_ID", "down_DI"):
        assert torch.allclose(
            getattr(merged, name), 0.25 * getattr(first, name) + 0.75 * getattr(second, name)
        )
    assert merged.gate_bias_I is None
    assert average([first], [1.0]) is first
    same = average([first, first, first], [1 / 3] * 3)
    assert torch.equal(same.down_DI, first.down_DI)


def test_cosines_are_means_over_tokens_and_ignore_positive_routing_weights() -> None:
    outputs_ETD = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = mean_cosine(outputs_ETD)
    slow = np.array(
        [
            [torch.cosine_similarity(outputs_ETD[i], outputs_ETD[j], dim=-1).mean() for j in range(4)]
            for i in range(4)
        ]
    )
    assert np.allclose(found, slow, atol=1e-12)
    weighted = outputs_ETD * torch.rand(4, 7, 1, dtype=torch.float64).clamp(min=1e-3)
    assert np.allclose(mean_cosine(weighted), found, atol=1e-12)


def test_the_cosine_of_logit_columns_is_their_correlation() -> None:
    logits_TE = torch.randn(50, 4, generator=torch.Generator().manual_seed(4))
    assert np.allclose(column_cosine(logits_TE), np.corrcoef(logits_TE.numpy().T), atol=1e-6)


def test_router_groups_are_neighbours() -> None:
    assert in_router_groups(8, 4) == [range(2), range(2, 4), range(4, 6), range(6, 8)]
    assert in_router_groups(8, 1) == [range(8)]
