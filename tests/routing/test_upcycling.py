"""Neurons dealt out and laid side by side: sums that must not change, clusters and routers with known answers."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from core.routing._upcycling import (
    GatedMlp,
    balanced_clusters,
    constant_gates,
    dealt,
    fused,
    laid_side_by_side,
    linear_router,
    padded,
    redrawn,
)

D, WIDTH, TOKENS = 10, 24, 40


def random_mlp(seed: int, width: int = WIDTH) -> GatedMlp:
    made = torch.Generator().manual_seed(seed)
    shapes = ((width, D), (width, D), (D, width))
    return GatedMlp(*(torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes))


def neuron_by_neuron(mlp: GatedMlp, token_D: torch.Tensor) -> torch.Tensor:
    """The slow definition: one neuron after another."""
    out_D = torch.zeros(D, dtype=torch.float64)
    for gate_D, up_D, write_D in zip(mlp.gate_ID, mlp.up_ID, mlp.down_DI.T, strict=True):
        gate = gate_D @ token_D
        out_D += gate * torch.sigmoid(gate) * (up_D @ token_D) * write_D
    return out_D


def f(mlp: GatedMlp, tokens_TD: torch.Tensor) -> torch.Tensor:
    return torch.stack([neuron_by_neuron(mlp, token_D) for token_D in tokens_TD])


@pytest.fixture
def tokens_TD() -> torch.Tensor:
    return torch.randn(5, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 24])
def test_dealt_neurons_sum_to_the_mlp_times_the_scale(n: int, tokens_TD: torch.Tensor) -> None:
    mlp = random_mlp(0)
    cluster_I = torch.arange(WIDTH).flip(0) % n
    parts = dealt(mlp, cluster_I, n, scale=3.0)
    assert [part.width for part in parts] == [WIDTH // n] * n
    torch.testing.assert_close(
        sum(f(part, tokens_TD) for part in parts), 3 * f(mlp, tokens_TD), rtol=1e-12, atol=1e-12
    )


def test_side_by_side_is_the_weighted_sum(tokens_TD: torch.Tensor) -> None:
    mlps = [random_mlp(seed, width) for seed, width in enumerate((8, 3, 5))]
    gates_M = torch.tensor([0.7, -0.2, 1.9], dtype=torch.float64)
    wide = laid_side_by_side(mlps, gates_M)
    assert wide.width == 16
    wanted = sum(gate * f(mlp, tokens_TD) for gate, mlp in zip(gates_M, mlps, strict=True))
    torch.testing.assert_close(f(wide, tokens_TD), wanted, rtol=1e-12, atol=1e-12)


def test_padding_adds_exactly_nothing(tokens_TD: torch.Tensor) -> None:
    mlp = random_mlp(1)
    assert padded(mlp, 31).width == 31
    assert torch.equal(f(padded(mlp, 31), tokens_TD), f(mlp, tokens_TD))


def test_fused_experts_are_gate_over_up_and_down() -> None:
    mlps = [random_mlp(seed) for seed in range(3)]
    gate_up, down = fused(mlps)
    for expert, mlp in enumerate(mlps):
        assert torch.equal(gate_up[expert][:WIDTH], mlp.gate_ID)
        assert torch.equal(gate_up[expert][WIDTH:], mlp.up_ID)
        assert torch.equal(down[expert], mlp.down_DI)


@pytest.mark.parametrize(("share", "n"), [(0.0, 0), (0.25, 6), (0.5, 12), (1.0, 24)])
def test_the_stated_share_of_neurons_is_drawn_anew_alike_in_all_three(share: float, n: int) -> None:
    mlp = random_mlp(2)
    fresh = redrawn(mlp, share, torch.Generator().manual_seed(0))
    changed = [
        (fresh.gate_ID != mlp.gate_ID).any(1),
        (fresh.up_ID != mlp.up_ID).any(1),
        (fresh.down_DI != mlp.down_DI).any(0),
    ]
    assert int(changed[0].sum()) == n
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    again = redrawn(mlp, share, torch.Generator().manual_seed(0))
    assert all(torch.equal(one, other) for one, other in zip(fresh, again, strict=True))


def test_what_is_drawn_anew_has_mean_and_deviation_of_what_it_replaces() -> None:
    made = torch.Generator().manual_seed(3)
    shapes = ((400, 100), (400, 100), (100, 400))
    moments = ((2.0, 0.5), (-1.0, 3.0), (0.0, 0.1))
    mlp = GatedMlp(
        *(m + s * torch.randn(shape, generator=made) for shape, (m, s) in zip(shapes, moments, strict=True))
    )
    fresh = redrawn(mlp, 1.0, made)
    for weight, (mean, std) in zip(fresh, moments, strict=True):
        assert float(weight.mean()) == pytest.approx(
            mean, abs=5 * std / 200
        )  # 40,000 values: standard error std / 200
        assert float(weight.std()) == pytest.approx(std, rel=0.02)


def test_planted_clusters_are_found_whatever_the_order() -> None:
    made = torch.Generator().manual_seed(4)
    planted_I = torch.arange(60) % 5
    shuffled_I = planted_I[torch.randperm(60, generator=made)]
    directions = torch.linalg.qr(torch.randn(12, 12, generator=made)).Q[:5]
    features = (1 + torch.rand(60, 1, generator=made)) * directions[shuffled_I]
    features = features + 0.05 * torch.randn(60, 12, generator=made)
    found_I = balanced_clusters(features, 5, seed=0)
    assert torch.equal(found_I[:, None] == found_I, shuffled_I[:, None] == shuffled_I)


def test_clusters_are_of_equal_size_even_where_neurons_are_not() -> None:
    """Five neurons point one way and three the other; room for four each moves the one that is least like the five."""
    angles = torch.tensor([0.0, 0.02, 0.04, 0.06, 0.3, 3.0, 3.02, 3.04])
    found_I = balanced_clusters(torch.stack([angles.cos(), angles.sin()], 1), 2, seed=0)
    assert found_I.bincount().tolist() == [4, 4]
    assert len(set(found_I[:4].tolist())) == 1
    assert len(set(found_I[4:].tolist())) == 1


@pytest.mark.parametrize("seed", range(5))
def test_clusters_of_random_neurons_are_near_the_best_of_all_partitions(seed: int) -> None:
    points = torch.nn.functional.normalize(
        torch.randn(10, 3, generator=torch.Generator().manual_seed(seed)), dim=-1
    )

    def cost(members: set[int]) -> float:
        sides = [points[[i in members for i in range(10)]], points[[i not in members for i in range(10)]]]
        return float(sum((side - side.mean(0)).square().sum() for side in sides))

    every = [cost(set(members)) for members in combinations(range(10), 5)]
    found = balanced_clusters(points, 2, seed=seed)
    mine = cost({i for i in range(10) if found[i] == 0})
    assert min(every) <= mine + 1e-6
    assert sum(one < mine - 1e-6 for one in every) <= 0.1 * len(every)  # among the best tenth of all 252


def test_a_router_learns_scores_that_are_linear_and_keeps_them_small() -> None:
    made = torch.Generator().manual_seed(5)
    read_TD = torch.randn(400, D, generator=made, dtype=torch.float64)
    true_DE = torch.randn(D, 6, generator=made, dtype=torch.float64)
    score_TE = read_TD @ true_DE
    centred_TE = score_TE - score_TE.mean(-1, keepdim=True)
    rows_ED = linear_router(read_TD.T @ read_TD, read_TD.T @ centred_TE, 400, spread=2.0**-13)
    logits_TE = read_TD @ rows_ED.T
    agreement = (logits_TE.argmax(-1) == score_TE.argmax(-1)).double().mean()
    assert float(agreement) > 0.99
    assert float(logits_TE.std(unbiased=False)) == pytest.approx(2.0**-13, rel=1e-3)


def test_the_router_is_ridge_regression_by_an_independent_solver() -> None:
    made = torch.Generator().manual_seed(6)
    read_TD = torch.randn(60, D, generator=made, dtype=torch.float64)
    centred_TE = torch.randn(60, 4, generator=made, dtype=torch.float64)
    centred_TE = centred_TE - centred_TE.mean(-1, keepdim=True)
    gram_DD = read_TD.T @ read_TD
    # Ridge as least squares on more rows: √λ for each coefficient, wanted 0.
    extra_DD = (1e-3 * gram_DD.diagonal().mean()).sqrt() * torch.eye(D, dtype=torch.float64)
    rows, wanted = (
        torch.cat([read_TD, extra_DD]),
        torch.cat([centred_TE, torch.zeros(D, 4, dtype=torch.float64)]),
    )
    oracle_ED = torch.linalg.lstsq(rows, wanted).solution.T
    found_ED = linear_router(gram_DD, read_TD.T @ centred_TE, 60, spread=1.0)
    torch.testing.assert_close(found_ED / found_ED.norm(), oracle_ED / oracle_ED.norm(), rtol=1e-9, atol=1e-9)


def test_constant_gates_are_found_and_copies_share_theirs() -> None:
    made = torch.Generator().manual_seed(7)
    outputs_MX = torch.randn(3, 200, generator=made, dtype=torch.float64)
    true_M = torch.tensor([0.5, 0.3, -1.0], dtype=torch.float64)
    wanted_X = true_M @ outputs_MX
    torch.testing.assert_close(constant_gates(outputs_MX @ outputs_MX.T, outputs_MX @ wanted_X), true_M)
    twice_MX = torch.cat([outputs_MX, outputs_MX[:1]])
    shared_M = constant_gates(twice_MX @ twice_MX.T, twice_MX @ wanted_X)
    torch.testing.assert_close(shared_M, torch.tensor([0.25, 0.3, -1.0, 0.25], dtype=torch.float64))
