"""How ``demo:moe`` was trained and judged: losses and gates with known answers, and a training in miniature."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.demo_moe.gates import (
    alive_gate,
    balance_gate,
    dense_gate,
    information_gate,
    preference_gate,
    pruned_gate,
)
from scripts.demo_moe.loop import Run, decisions, new_model, rate, train
from scripts.demo_moe.losses import load_balance, router_z, shares, within_pools
from scripts.demo_moe.text import batch

pytestmark = pytest.mark.rotating

E, K = 8, 2


@pytest.fixture(scope="module")
def streams() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {f"{d}": generator.integers(d * 40, d * 40 + 12, 4000).astype(np.uint16) for d in range(4)}


class TestLosses:
    def test_balance_is_k_when_uniform_and_e_when_k_experts_take_all(self) -> None:
        uniform = torch.full((1, E), K / E), torch.full((1, E), 1 / E)
        alone = torch.zeros(1, E)
        alone[0, :K] = 1
        assert load_balance(*uniform).item() == pytest.approx(K)
        assert load_balance(alone, alone / K).item() == pytest.approx(E)

    def test_layers_that_collapse_apart_are_not_taken_for_balanced(self) -> None:
        apart = torch.zeros(4, E)
        for layer in range(4):
            apart[layer, 2 * layer : 2 * layer + 2] = 1
        assert load_balance(apart, apart / K).tolist() == pytest.approx([E] * 4)
        pooled = load_balance(apart.mean(0, keepdim=True), apart.mean(0, keepdim=True) / K)
        assert pooled.item() == pytest.approx(K)  # what pooling all layers first would have said

    def test_shares_sum_to_k(self) -> None:
        chosen = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]])
        assert shares(chosen, 4).tolist() == [1.0, 0.5, 0.25, 0.25]

    def test_z_of_equal_logits(self) -> None:
        assert router_z(torch.zeros(3, E)).item() == pytest.approx(np.log(E) ** 2)

    def test_a_pool_holds_a_sequences_favourites_and_is_free_when_large(self) -> None:
        logits = torch.randn(3, 5, E, generator=torch.Generator().manual_seed(0))
        pooled = within_pools(logits, torch.tensor([2, 3, E]))
        for row, size in enumerate((2, 3, E)):
            favourites = set(logits[row].softmax(-1).mean(0).topk(size).indices.tolist())
            open_to = {e for e in range(E) if torch.isfinite(pooled[row, :, e]).all()}
            assert open_to == favourites
        assert torch.equal(pooled[2], logits[2])


class TestLoop:
    def test_sorted_experts_are_the_default_experts(self) -> None:
        model = new_model().double().eval()
        ids = torch.randint(0, 2048, (2, 17), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours = model(ids).logits
            model.set_experts_implementation("eager")
            torch.testing.assert_close(model(ids).logits, ours, rtol=0, atol=1e-12)

    def test_the_twin_has_the_same_active_parameters_but_for_the_router(self) -> None:
        moe, twin = new_model(), new_model(dense=True)
        experts = sum(p.numel() for name, p in moe.named_parameters() if ".experts." in name)
        routers = 4 * (16 - 1) * 128
        active = sum(p.numel() for p in moe.parameters()) - experts * 14 // 16
        assert active - routers == sum(p.numel() for p in twin.parameters())

    def test_a_batch_holds_every_domain_alike(self, streams: dict[str, np.ndarray]) -> None:
        ids = batch(streams, per_domain=2, length=32, seed=(1, 2))
        assert ids.shape == (8, 33)
        assert (ids // 40).min(1).values.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert torch.equal(ids, batch(streams, per_domain=2, length=32, seed=(1, 2)))
        assert not torch.equal(ids, batch(streams, per_domain=2, length=32, seed=(1, 3)))

    @pytest.mark.slow
    def test_twenty_steps_reduce_the_loss_and_a_cut_run_goes_on(
        self, streams: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        replay = [(step + 1) / 400 for step in range(20)]
        whole = Run(new_model(), streams, seconds=None, replay=replay)
        train(whole, file=tmp_path / "whole.pt", windows_BP=torch.arange(64)[None])
        assert whole.state.losses[0][0] == pytest.approx(np.log(2048), abs=0.1)
        assert whole.state.losses[-1][0] < whole.state.losses[0][0] - 0.2
        assert len(whole.state.marks) == 1  # 1 % was passed, 10 % was not
        assert whole.state.marks[0][1].shape == (4, 64, 2)

        cut = Run(new_model(), streams, seconds=None, replay=replay[:7])
        train(cut, file=tmp_path / "cut.pt", windows_BP=torch.arange(64)[None])
        resumed = Run(new_model(), streams, seconds=None, replay=replay)
        resumed.load(tmp_path / "cut.pt")
        train(resumed, file=tmp_path / "cut.pt", windows_BP=torch.arange(64)[None])
        for ours, theirs in zip(whole.parameters, resumed.parameters, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    def test_two_processes_that_add_up_end_with_equal_weights(self, streams: dict[str, np.ndarray]) -> None:
        """Each is given the other's summands, recorded in a first round that changes nothing else."""
        sent: dict[int, torch.Tensor] = {}

        def keep(rank: int, flat: torch.Tensor) -> None:
            sent[rank] = flat.clone()

        for rank in (0, 1):
            Run(
                new_model(),
                streams,
                seconds=None,
                replay=[0.1],
                rank=rank,
                world=2,
                add_up=partial(keep, rank),
            ).step()
        assert not torch.equal(sent[0], sent[1])
        pair = [Run(new_model(), streams, seconds=None, replay=[0.1], rank=rank, world=2) for rank in (0, 1)]
        for run, other in zip(pair, (1, 0), strict=True):
            run.add_up = lambda flat, other=other: flat.add_(sent[other])
            run.step()
        for ours, theirs in zip(pair[0].parameters, pair[1].parameters, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)

    def test_the_rate_rises_then_falls(self) -> None:
        assert rate(0.0, 0) < rate(0.05, 99) > rate(0.5, 1000) > rate(1.0, 2000) > 0

    def test_decisions_are_the_routers_own(self) -> None:
        model = new_model()
        ids = torch.randint(0, 2048, (3, 16), generator=torch.Generator().manual_seed(1))
        found = decisions(model, ids)
        logits = model(ids, output_router_logits=True).router_logits
        for layer in range(4):
            wanted = logits[layer].topk(2).indices.sort(-1).values
            assert torch.equal(found[layer].long().sort(-1).values, wanted)


class TestGates:
    def test_information_of_an_oracle_and_of_a_blind_router(self) -> None:
        domain_U = np.repeat(np.arange(4), 10)
        oracle = np.zeros((40, 2, 4), dtype=np.int64)
        oracle[np.arange(40), :, domain_U] = 50
        assert information_gate(oracle, domain_U).met
        assert information_gate(oracle, domain_U).found.startswith("by layer 1.000")
        assert not information_gate(np.full((40, 2, 4), 50), domain_U).met

    def test_preference_dead_and_balance_of_a_uniform_and_of_an_oracle_router(self) -> None:
        tokens = np.array([100, 100, 100, 100])
        uniform = np.full((4, 1, 8), 25)  # k = 2 of 8
        assert not preference_gate(uniform, tokens, 2).met
        assert alive_gate(uniform, tokens, 2).met
        assert balance_gate(uniform, uniform / 2, tokens).met
        oracle = np.zeros((4, 1, 8))
        for d in range(4):
            oracle[d, 0, 2 * d : 2 * d + 2] = 100
        assert preference_gate(oracle, tokens, 2).found.startswith("8 of 8 experts; largest by layer 4.0")
        assert alive_gate(oracle, tokens, 2).met
        assert balance_gate(oracle, oracle / 2, tokens).met  # specialised and balanced over all domains
        collapsed = np.zeros((4, 1, 8))
        collapsed[:, 0, :2] = 100
        assert not alive_gate(collapsed, tokens, 2).met
        assert balance_gate(collapsed, collapsed / 2, tokens).found == "by layer 8.00"
        assert not balance_gate(collapsed, collapsed / 2, tokens).met

    def test_dense_gate_compares_means_over_domains(self) -> None:
        twin = {"a": [[100.0, 50]] * 10, "b": [[300.0, 100]] * 10}  # 2 and 3 nats, mean 2.5
        better = {name: [[0.9 * nats, n] for nats, n in rows] for name, rows in twin.items()}
        found = dense_gate(better, twin)
        assert found.met
        assert "2.250 against 2.500 nats per token: ratio 0.900 (0.900 to 0.900)" in found.found
        assert not dense_gate(twin, twin).met

    def test_pruned_gate_wants_every_domain_spared(self) -> None:
        good = {"a": {"a": 0.1, "b": 0.5}, "b": {"a": 0.6, "b": 0.2}}
        assert pruned_gate(good).met
        assert "mean +0.150 on the own, +0.550 on others" in pruned_gate(good).found
        bad = {"a": {"a": 0.9, "b": 0.5}, "b": {"a": 0.6, "b": 0.2}}
        assert not pruned_gate(bad).met
        assert "not: a" in pruned_gate(bad).found
