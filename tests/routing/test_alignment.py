"""Reordered neurons compute the same, and a shuffled copy of an expert is brought back into order, in every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.models.loaded import LoadedModel
from core.routing.alignment import cheapest_order, neuron_activations, neuron_cost, reordered
from core.routing.discover import moe_layers
from core.routing.merging import average
from core.routing.merging_profile import expert_output
from core.routing.surgery import ExpertWeights, read_expert, write_expert
from tests.compress.making import own_model
from tests.references.slow_merging import slow_cheapest, swiglu
from tests.tiny import MOE, SHIMMED, tiny_model

EVERY = (*MOE, *SHIMMED)


def tokens(loaded: LoadedModel, n: int = 40) -> torch.Tensor:
    return torch.randn(n, loaded.anatomy.d_model, generator=torch.Generator().manual_seed(5))


def shuffled(expert: ExpertWeights, seed: int = 0) -> tuple[ExpertWeights, np.ndarray]:
    order_I = np.random.default_rng(seed).permutation(len(expert.up_ID))
    return reordered(expert, order_I), order_I


@pytest.mark.parametrize("family", EVERY)
def test_an_expert_with_its_neurons_in_another_order_computes_the_same(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    layer = moe_layers(loaded)[0]
    experts = loaded.model.get_submodule(layer.experts)
    x_TD = tokens(loaded)
    with torch.inference_mode():
        before = expert_output(experts, 1, x_TD)
        moved, order_I = shuffled(read_expert(loaded, layer.layer, 1))
        assert not torch.equal(moved.up_ID, read_expert(loaded, layer.layer, 1).up_ID)
        activations_TI = neuron_activations(experts, 1, x_TD)
        write_expert(loaded, layer.layer, 1, moved)
        assert torch.allclose(neuron_activations(experts, 1, x_TD), activations_TI[:, order_I])
        assert torch.allclose(expert_output(experts, 1, x_TD), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", EVERY)
def test_a_duplicate_with_shuffled_neurons_merges_into_the_original(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    layer = moe_layers(loaded)[0]
    experts = loaded.model.get_submodule(layer.experts)
    original = read_expert(loaded, layer.layer, 0)
    copy, order_I = shuffled(original)
    write_expert(loaded, layer.layer, 1, copy)
    x_TD = tokens(loaded)
    cost_II = neuron_cost(
        original, copy, neuron_activations(experts, 0, x_TD), neuron_activations(experts, 1, x_TD)
    )
    found_I = cheapest_order(cost_II)
    assert np.array_equal(order_I[found_I], np.arange(len(order_I)))
    merged = average([original, reordered(copy, found_I)], [0.3, 0.7])
    naive = average([original, copy], [0.3, 0.7])
    for name in ("up_ID", "down_DI"):
        # 0.3 + 0.7 is 1 to one unit of float64: the sum rounds to the original's float32.
        assert torch.equal(getattr(merged, name), getattr(original, name))
        assert not torch.allclose(getattr(naive, name), getattr(original, name), atol=1e-2)


def test_what_is_read_as_neurons_is_what_the_formula_gives() -> None:
    loaded = tiny_model("olmoe")
    layer = moe_layers(loaded)[0]
    experts = loaded.model.get_submodule(layer.experts)
    weights = read_expert(loaded, layer.layer, 2)
    assert weights.gate_ID is not None
    x_TD = tokens(loaded, 3)
    with torch.inference_mode():
        found = expert_output(experts, 2, x_TD)
    for x_D, out_D in zip(x_TD, found, strict=True):
        slow = swiglu(
            *(w.double().numpy() for w in (weights.gate_ID, weights.up_ID, weights.down_DI)),
            x_D.double().numpy(),
        )
        assert np.allclose(out_D.numpy(), slow, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_the_neurons_is_cheaper(seed: int) -> None:
    cost_II = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order_I = cheapest_order(cost_II)
    assert sorted(order_I) == list(range(6))
    assert float(cost_II[torch.arange(6), torch.as_tensor(order_I)].sum()) == pytest.approx(
        slow_cheapest(cost_II.numpy())
    )


def test_neither_activations_nor_weights_rule_by_their_unit() -> None:
    loaded = tiny_model("olmoe")
    layer = moe_layers(loaded)[0]
    experts = loaded.model.get_submodule(layer.experts)
    first, second = (read_expert(loaded, layer.layer, e) for e in (0, 1))
    done = [neuron_activations(experts, e, tokens(loaded)) for e in (0, 1)]
    cost_II = neuron_cost(first, second, *done)
    assert torch.allclose(neuron_cost(first, second, 1000 * done[0], 0.001 * done[1]), cost_II)
    assert 0 <= float(cost_II.min()) <= float(cost_II.max()) <= 2
