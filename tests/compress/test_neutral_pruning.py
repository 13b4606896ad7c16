"""Removing experts that the tokens at hand do not use: free where the router says so, and by how much where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.models.loaded import LoadedModel
from core.routing.discover import MoeLayer, moe_layers, neutral_when_unused
from core.routing.surgery import keep_experts
from tests.compress.making import grouped_model, own_model
from tests.references.slow_experts import decisions
from tests.tiny import MOE

TOKEN = [7]


def unused(loaded: LoadedModel) -> dict[int, int]:
    """One expert of each layer that the token is not routed to."""
    chosen = {at.layer: decisions(loaded.model, at.experts, TOKEN)[1] for at in moe_layers(loaded)}
    return {
        at.layer: next(e for e in range(at.n_experts) if e not in chosen[at.layer].flatten().tolist())
        for at in moe_layers(loaded)
    }


def without(layer: MoeLayer, expert: int) -> list[int]:
    return [e for e in range(layer.n_experts) if e != expert]


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = loaded.model(torch.tensor([TOKEN])).logits
    return found


@pytest.mark.parametrize("family", [name for name in MOE if name != "deepseek_v3"])
def test_an_unused_expert_is_free_exactly_where_the_router_is_said_to_be_neutral(
    family: str, tmp_path: Path
) -> None:
    loaded = own_model(family, tmp_path)
    layers, gone, before = moe_layers(loaded), unused(loaded), logits(loaded)
    keep_experts(loaded, {at.layer: without(at, gone[at.layer]) for at in layers})
    change = float((logits(loaded) - before).abs().max() / before.abs().max())
    if all(map(neutral_when_unused, layers)):
        assert change < 1e-5
    else:
        assert change > 1e-4


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "jamba"])
def test_weights_grow_by_one_over_what_is_left_of_the_softmax(family: str, tmp_path: Path) -> None:
    """w' = w / (1 − Σ p of the removed), exactly, in the first layer, whose input is the same."""
    loaded = own_model(family, tmp_path)
    layers, gone = moe_layers(loaded), unused(loaded)
    first = layers[0]
    hidden_TD, chosen_TK, weights_TK = decisions(loaded.model, first.experts, TOKEN)
    rows_ED = loaded.model.get_submodule(first.router).weight.clone()
    p_TE = (hidden_TD.double() @ rows_ED.double().T).softmax(-1)
    keep_experts(loaded, {at.layer: without(at, gone[at.layer]) for at in layers})
    _, chosen_after_TK, after_TK = decisions(loaded.model, first.experts, TOKEN)
    kept = without(first, gone[first.layer])
    assert [kept[e] for e in chosen_after_TK.flatten().tolist()] == chosen_TK.flatten().tolist()
    expected_TK = weights_TK.double() / (1 - p_TE[:, [gone[first.layer]]])
    assert torch.allclose(after_TK.double(), expected_TK, rtol=1e-5)
    assert float((after_TK / weights_TK).min()) > 1.001  # it is not a rounding


def test_a_group_limited_router_keeps_its_choice_when_each_group_loses_its_worst(tmp_path: Path) -> None:
    loaded = grouped_model(tmp_path / "base")
    layers, before = moe_layers(loaded), logits(loaded)
    kept = {}
    for at in layers:
        hidden_TD, chosen_TK, _ = decisions(loaded.model, at.experts, TOKEN)
        router = loaded.model.get_submodule(at.router)
        scores_E = (hidden_TD @ router.weight.T).sigmoid()[0] + router.e_score_correction_bias
        groups = [range(first, first + 4) for first in range(0, 16, 4)]
        kept[at.layer] = [
            e for group in groups for e in group if e != min(group, key=lambda i: float(scores_E[i]))
        ]
        assert set(chosen_TK.flatten().tolist()) <= set(kept[at.layer])
    keep_experts(loaded, kept)
    assert {(at.n_experts, at.n_groups) for at in moe_layers(loaded)} == {(12, 4)}
    assert torch.allclose(logits(loaded), before, rtol=1e-4, atol=1e-5)
