"""Editing experts in place: what is kept computes what it did, and what cannot be saved is refused before any change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import BadInput, CannotCompress
from core.models.loaded import LoadedModel
from core.routing.discover import moe_layers
from core.routing.surgery import keep_experts, read_expert, set_top_k, write_expert
from core.saving.proof import _probe_inputs
from tests.compress.making import apply, own_model
from tests.tiny import MOE, tiny_model


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = loaded.model(**_probe_inputs(loaded)).logits
    return found


def in_order(loaded: LoadedModel, n: int) -> dict[int, list[int]]:
    """The first ``n`` experts of every layer, taken evenly from its groups."""
    kept = {}
    for layer in moe_layers(loaded):
        size, old = n // layer.n_groups, layer.n_experts // layer.n_groups
        kept[layer.layer] = [g * old + e for g in range(layer.n_groups) for e in range(size)]
    return kept


@pytest.mark.parametrize("family", MOE)
def test_permuting_experts_with_their_router_rows_changes_nothing(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    before = logits(loaded)
    orders = {}
    for layer in moe_layers(loaded):
        size = layer.n_experts // layer.n_groups
        groups = [list(range(g * size, (g + 1) * size))[::-1] for g in range(layer.n_groups)][::-1]
        orders[layer.layer] = [e for group in groups for e in group]
    firsts = {layer: read_expert(loaded, layer, order[0]) for layer, order in orders.items()}
    keep_experts(loaded, orders)
    assert torch.allclose(logits(loaded), before, rtol=1e-4, atol=1e-5)
    for layer, weights in firsts.items():
        assert torch.equal(read_expert(loaded, layer, 0).down_DI, weights.down_DI)


@pytest.mark.parametrize("family", MOE)
def test_an_expert_read_as_linear_layers_computes_what_the_fused_module_does(family: str) -> None:
    loaded = tiny_model(family)
    layer = moe_layers(loaded)[0]
    if layer.shim:
        pytest.skip("its experts take one argument")
    experts = loaded.model.get_submodule(layer.experts)
    x_TD = torch.randn(5, loaded.anatomy.d_model, generator=torch.Generator().manual_seed(1))
    w = read_expert(loaded, layer.layer, 2)
    with torch.inference_mode():
        chosen_T1 = torch.full((5, 1), 2)
        expected_TD = experts(x_TD, chosen_T1, torch.ones(5, 1))
        first = [x_TD @ m.T + (0 if b is None else b) for m, b in
                 ((w.gate_ID, w.gate_bias_I), (w.up_ID, w.up_bias_I)) if m is not None]  # fmt: skip
        if len(first) == 1:
            neurons_TI = experts.act_fn(first[0])
        elif experts.is_concatenated:
            neurons_TI = experts._apply_gate(torch.cat(first, -1))
        else:
            neurons_TI = experts._apply_gate(torch.stack(first, -1).flatten(-2))
        found_TD = neurons_TI @ w.down_DI.T + (0 if w.down_bias_D is None else w.down_bias_D)
    assert torch.allclose(found_TD, expected_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MOE)
def test_what_is_written_is_read_and_no_other_expert_changes(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    layer = moe_layers(loaded)[-1].layer
    third, first = read_expert(loaded, layer, 3), read_expert(loaded, layer, 1)
    write_expert(loaded, layer, 0, third)
    again = read_expert(loaded, layer, 0)
    for name in ("gate_ID", "up_ID", "down_DI", "gate_bias_I", "up_bias_I", "down_bias_D"):
        written, wanted = getattr(again, name), getattr(third, name)
        assert (written is None and wanted is None) or torch.equal(written, wanted), name
    assert torch.equal(read_expert(loaded, layer, 1).up_ID, first.up_ID)


@pytest.mark.parametrize("family", MOE)
def test_fewer_experts_are_counted_everywhere(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    layers = moe_layers(loaded)
    n = layers[0].n_experts - layers[0].n_groups
    keep_experts(loaded, in_order(loaded, n))
    assert loaded.anatomy.n_experts == n
    assert {layer.n_experts for layer in moe_layers(loaded)} == {n}
    twin = type(loaded.model)(loaded.model.config)  # what a reload would build from the edited config
    shapes = {name: p.shape for name, p in loaded.model.state_dict().items()}
    assert {name: p.shape for name, p in twin.state_dict().items()} == shapes


@pytest.mark.parametrize("family", MOE)
def test_top_k_is_set_everywhere_and_set_back(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    before, k = logits(loaded), moe_layers(loaded)[0].top_k
    set_top_k(loaded, k + 1)
    assert loaded.anatomy.experts_per_token == k + 1
    assert {layer.top_k for layer in moe_layers(loaded)} == {k + 1}
    assert not torch.allclose(logits(loaded), before, rtol=1e-3)
    set_top_k(loaded, k)
    assert torch.equal(logits(loaded), before)


def test_what_cannot_be_saved_is_refused_with_nothing_changed(tmp_path: Path) -> None:
    loaded = own_model("qwen3_moe", tmp_path)  # MoE layers 0 and 2
    before = logits(loaded)
    for kept, message in (
        ({0: [0, 1, 2]}, r"name every one"),
        ({0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1, 2]}, r"MoE layers are \[0, 2\]"),
        ({0: [0, 1, 2], 2: [0, 1]}, r"same number in every layer"),
        ({0: [0], 2: [1]}, r"keep at least 2"),
        ({0: [0, 4], 2: [0, 1]}, r"distinct experts among 0 to 3"),
        ({0: [1, 1], 2: [0, 1]}, r"distinct experts"),
    ):
        with pytest.raises(BadInput, match=message):
            keep_experts(loaded, kept)
    for k in (0, 5):
        with pytest.raises(BadInput, match="1 to 4 experts"):
            set_top_k(loaded, k)
    assert torch.equal(logits(loaded), before)
    assert loaded.anatomy.n_experts == 4


def test_a_dense_model_has_no_experts_to_keep(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is dense"):
        keep_experts(tiny_model("llama"), {0: [0]})
    with pytest.raises(BadInput, match="layer 1 has no experts"):
        read_expert(tiny_model("qwen3_moe"), 1, 0)


def test_structure_is_edited_before_quantizing(tmp_path: Path) -> None:
    loaded = own_model("mixtral", tmp_path)
    apply(loaded, "rtn")
    with pytest.raises(CannotCompress, match="quantize last"):
        keep_experts(loaded, in_order(loaded, 3))
    with pytest.raises(CannotCompress, match="quantize last"):
        write_expert(loaded, 0, 0, read_expert(loaded, 0, 1))
