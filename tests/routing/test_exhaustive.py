"""The exhaustive search: its losses are those of blocks cut by hand, and no criterion's choice is below its best."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from core.errors import BadInput
from core.routing.aggregate import aggregate
from core.routing.criteria import Criterion, best_experts, scores_LE
from core.routing.discover import moe_layers
from core.routing.exhaustive import LayerLoss, best_subset, kept_sets, layer_inputs, n_sets
from core.routing.trace import token_ids
from core.types import Documents
from tests.references.slow_experts import decisions, loss_of_kept
from tests.tiny import CORPUS, MOE, tiny_model

TEXT = Documents("corpus", "calibration", CORPUS)
HEURISTICS: tuple[Criterion, ...] = ("frequency", "ean", "reap", "man", "msan", "aimer", "random")


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe"])
def test_the_loss_is_that_of_a_block_cut_by_hand(family: str) -> None:
    loaded = tiny_model(family)
    ids = token_ids(loaded, CORPUS[0])[:12]
    inputs = layer_inputs(loaded, [ids], 12)
    for at in moe_layers(loaded):
        hidden_TD = decisions(loaded.model, at.experts, ids)[0]
        assert np.allclose(inputs[at.layer].numpy(), hidden_TD.numpy())
        loss, block = LayerLoss(loaded, at, hidden_TD), loaded.model.get_submodule(at.mlp)
        for kept in combinations(range(at.n_experts), 3):
            assert loss.of(kept) == pytest.approx(loss_of_kept(block, hidden_TD, kept), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", MOE)
def test_no_choice_is_better_than_the_optimum_and_keeping_all_loses_nothing(family: str) -> None:
    loaded = tiny_model(family)
    counts = aggregate(loaded, TEXT, max_tokens=200, norms=True)
    inputs = layer_inputs(loaded, [token_ids(loaded, text)[:16] for text in CORPUS], 64)
    layers = moe_layers(loaded)
    n_kept = layers[0].n_experts - layers[0].n_groups
    if n_kept // layers[0].n_groups < 2:
        n_kept = layers[0].n_experts  # a group is ranked by its best two
    for index, at in enumerate(layers):
        loss = LayerLoss(loaded, at, inputs[at.layer])
        assert loss.of(range(at.n_experts)) == 0
        assert best_subset(loss, at, at.n_experts).loss == 0
        best = best_subset(loss, at, n_kept)
        assert best.n_sets == n_sets(at, n_kept) == len(list(kept_sets(at, n_kept)))
        for criterion in HEURISTICS:
            scores = scores_LE(criterion, loaded, layers, counts)[index]
            assert best.loss <= loss.of(best_experts(at, scores, n_kept)) + 1e-9, criterion


def test_too_many_sets_are_refused_with_their_number() -> None:
    at = dataclasses.replace(moe_layers(tiny_model("mixtral"))[0], n_experts=16)
    with pytest.raises(BadInput, match=r"12,870 per layer, more than 500.*reap, man or aimer"):
        best_subset(None, at, 8)  # type: ignore[arg-type]
