"""Scores of experts: against one token at a time, and the identities that each criterion has."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.routing.aggregate import Aggregates, aggregate
from core.routing.criteria import CRITERIA, Criterion, aimer, best_experts, never_reached, scores_LE
from core.routing.discover import MoeLayer, moe_layers
from core.routing.surgery import ExpertWeights, read_expert, write_expert
from core.routing.trace import token_ids
from core.types import Documents
from tests.compress.making import own_model
from tests.references import slow_experts
from tests.tiny import CORPUS, MOE, tiny_model

TEXT = Documents("corpus", "calibration", tuple(text[:40] for text in CORPUS[:2]))


def counted(loaded: LoadedModel) -> Aggregates:
    return aggregate(loaded, TEXT, max_tokens=10_000, norms=True)


@pytest.mark.parametrize("family", MOE)
def test_scores_from_counts_are_those_of_one_token_at_a_time(family: str) -> None:
    loaded = tiny_model(family)
    layers, counts = moe_layers(loaded), counted(loaded)
    texts = [token_ids(loaded, text) for text in TEXT.texts]
    for index, at in enumerate(layers):
        slow = {
            name: np.array(values)
            for name, values in slow_experts.sums(loaded.model, at.experts, texts, at.n_experts).items()
        }
        n = np.maximum(slow["count"], 1)
        expected: dict[Criterion, np.ndarray] = {
            "frequency": slow["count"],
            "ean": slow["norm"],
            "man": slow["norm"] / n,
            "msan": slow["square"] / n,
            "reap": slow["gated"] / n,
        }
        for criterion, values in expected.items():
            found = scores_LE(criterion, loaded, layers, counts)[index]
            assert found == pytest.approx(values, rel=1e-4), (criterion, at.layer)


def test_reap_with_all_routing_weights_one_is_man() -> None:
    loaded = tiny_model("olmoe")
    counts = counted(loaded)
    ones = dataclasses.replace(counts, gated_norm_sum_LE=counts.norm_sum_LE)
    layers = moe_layers(loaded)
    assert (scores_LE("reap", loaded, layers, ones) == scores_LE("man", loaded, layers, counts)).all()


def test_scaling_an_expert_scales_its_scores(tmp_path: Path) -> None:
    loaded = own_model("mixtral", tmp_path)
    last = moe_layers(loaded)[-1]  # what follows does not change what it reads
    before = {
        c: scores_LE(c, loaded, moe_layers(loaded), counted(loaded))[-1] for c in ("reap", "man", "msan")
    }
    weights = read_expert(loaded, last.layer, 1)
    write_expert(loaded, last.layer, 1, dataclasses.replace(weights, down_DI=3 * weights.down_DI))
    factors = {"reap": 3, "man": 3, "msan": 9}
    for criterion, scores in before.items():
        now = scores_LE(criterion, loaded, moe_layers(loaded), counted(loaded))[-1]  # type: ignore[arg-type]
        scale = np.ones(4)
        scale[1] = factors[criterion]
        assert now == pytest.approx(scores * scale, rel=1e-4)


@pytest.mark.parametrize("family", MOE)
def test_aimer_does_not_see_scale_and_knows_its_values(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    at = moe_layers(loaded)[0]
    weights = read_expert(loaded, at.layer, 0)
    before = aimer(loaded, at.layer, 0)
    # Drawn from a Gaussian: √(2/π), within five standard errors.
    n = sum(p.numel() for p in (weights.gate_ID, weights.up_ID, weights.down_DI) if p is not None)
    assert before == pytest.approx(math.sqrt(2 / math.pi), abs=5 * math.sqrt(1 - 2 / math.pi) / math.sqrt(n))

    def scaled(factor: float, *, flat: bool) -> ExpertWeights:
        parts = {
            name: None if value is None else factor * (value.sign() if flat and "bias" not in name else value)
            for name, value in vars(weights).items()
        }
        return ExpertWeights(**parts)

    write_expert(loaded, at.layer, 0, scaled(7.0, flat=False))
    assert aimer(loaded, at.layer, 0) == pytest.approx(before, rel=1e-6)
    write_expert(loaded, at.layer, 0, scaled(0.5, flat=True))
    assert aimer(loaded, at.layer, 0) == pytest.approx(1.0, rel=1e-6)
    # The one whose weights are all alike has the worst score, so it goes first.
    scores = scores_LE("aimer", loaded, moe_layers(loaded), None)[0]
    assert scores.argmin() == 0


def test_random_is_drawn_anew_by_seed_only() -> None:
    loaded, layers = tiny_model("mixtral"), moe_layers(tiny_model("mixtral"))
    first, again, other = (scores_LE("random", loaded, layers, None, seed=s) for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def a_layer(n_experts: int, n_groups: int) -> MoeLayer:
    at = moe_layers(tiny_model("deepseek_v3"))[0]
    return dataclasses.replace(at, n_experts=n_experts, n_groups=n_groups, top_groups=n_groups)


def test_the_best_stay_as_many_in_every_group() -> None:
    scores = np.array([9.0, 8, 7, 6, 1, 2, 3, 4])
    assert best_experts(a_layer(8, 1), scores, 4) == [0, 1, 2, 3]
    assert best_experts(a_layer(8, 2), scores, 4) == [0, 1, 6, 7]
    assert best_experts(a_layer(8, 2), scores, 4, protected={4}) == [0, 1, 4, 7]
    assert best_experts(a_layer(4, 1), np.zeros(4), 2) == [0, 1]
    with pytest.raises(BadInput, match=r"protects 3 experts of group 1 but would keep 2"):
        best_experts(a_layer(8, 2), scores, 4, protected={4, 5, 6})


def test_never_reached_experts_are_found(tmp_path: Path) -> None:
    loaded = own_model("gpt_oss", tmp_path)
    layers = moe_layers(loaded)
    loaded.model.get_submodule(layers[1].router).bias.data[3] = -1e6
    found = never_reached(layers, counted(loaded))
    assert 3 in found[layers[1].layer]
    assert all(3 not in experts for layer, experts in found.items() if layer != layers[1].layer)


def test_every_criterion_is_described() -> None:
    assert all(about.title and about.formula for about in CRITERIA.values())
    assert torch.is_inference_mode_enabled() is False
