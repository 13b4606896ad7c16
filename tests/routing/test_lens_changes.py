"""What a changed decision computes is what the model would compute if its weights or router had been changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.numerics.integer import quantize
from core.numerics.schemes import IntegerScheme
from core.routing import _experts
from core.routing.discover import moe_layers
from core.routing.lens import Change, Routed, routed
from tests.routing.test_lens import IDS, logits_of, same_in_order, watch
from tests.tiny import MOE, tiny_model

OwnCopy = Callable[..., LoadedModel]


@pytest.fixture(params=MOE)
def moe(request: pytest.FixtureRequest) -> LoadedModel:
    torch.set_num_threads(1)
    return tiny_model(request.param)


def changed(loaded: LoadedModel, change: Change, **how: Any) -> torch.Tensor:
    return watch(loaded, change=change, **how)[0]


def decisions(seen: list[Routed]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    return {at.layer: (at.experts_TK, at.weights_TK) for at in seen}


# --- replay and edit ----------------------------------------------------------------------------------


def test_replaying_its_own_routing_changes_no_bit(moe: LoadedModel):
    plain, seen = watch(moe)
    again, used = watch(moe, change=Change(replay=decisions(seen)))
    assert torch.equal(again, plain)
    for before, after in zip(seen, used, strict=True):
        assert torch.equal(before.experts_TK, after.experts_TK)
        assert torch.equal(before.weights_TK, after.weights_TK)


@pytest.mark.parametrize("side", ["left", "right"])
def test_so_it_does_with_padding(moe: LoadedModel, side: str):
    mask = torch.ones_like(IDS)
    mask[0, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    plain, seen = watch(moe, mask=mask)
    assert torch.equal(watch(moe, mask=mask, change=Change(replay=decisions(seen)))[0], plain)
    same = Change(edit=lambda at: (at.experts_TK, at.weights_TK))
    assert torch.equal(watch(moe, mask=mask, change=same)[0], plain)


def test_another_texts_routing_is_what_gets_used(moe: LoadedModel):
    plain, _ = watch(moe)
    _, other = watch(moe, IDS.flip(0) + 1)
    forced, used = watch(moe, change=Change(replay=decisions(other)))
    assert not torch.equal(forced, plain)
    for wanted, at in zip(other, used, strict=True):
        assert torch.equal(wanted.experts_TK, at.experts_TK)


def test_a_slot_without_expert_adds_nothing(moe: LoadedModel):
    """-1 and ids from E on are the same as weight 0, and are shown as -1."""
    _, seen = watch(moe)
    at = seen[0]
    zeroed = at.weights_TK.clone()
    zeroed[:, -1] = 0
    by_weight = changed(moe, Change(replay={at.layer: (at.experts_TK, zeroed)}))
    for gone in (-1, moe_layers(moe)[0].n_experts):
        experts_TK = at.experts_TK.clone()
        experts_TK[:, -1] = gone
        logits, used = watch(moe, change=Change(replay={at.layer: (experts_TK, at.weights_TK)}))
        torch.testing.assert_close(logits, by_weight, rtol=1e-4, atol=1e-4)
        assert bool((used[0].experts_TK[:, -1] == -1).all())
        assert not used[0].weights_TK[:, -1].any()


def test_one_tokens_expert_can_be_swapped(moe: LoadedModel):
    """Only that token and those after it change, and the decision is the edited one."""
    plain, seen = watch(moe)
    first, token = seen[0].layer, 7
    left_out = next(e for e in range(seen[0].experts_TK.max() + 1) if e not in seen[0].experts_TK[token])

    def swap(at: Routed) -> tuple[torch.Tensor, torch.Tensor] | None:
        if at.layer != first:
            return None
        experts_TK = at.experts_TK.clone()
        experts_TK[token, 0] = left_out
        return experts_TK, at.weights_TK

    logits, used = watch(moe, change=Change(edit=swap))
    assert used[0].experts_TK[token, 0] == left_out
    torch.testing.assert_close(logits[0, :token], plain[0, :token], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], plain[1], rtol=1e-4, atol=1e-4)
    assert (logits[0, token] - plain[0, token]).abs().max() > 1e-2


# --- ablation, maps, grids, top-k ---------------------------------------------------------------------


def silence(experts: Any, expert: int) -> None:
    """Make an expert put out zero by its weights."""
    with torch.no_grad():
        experts.down_proj[expert].zero_()
        if experts.has_bias:
            experts.down_proj_bias[expert].zero_()


def assert_ablating_is_zeroing_the_down_projection(family: str, own_copy: OwnCopy) -> None:
    loaded = own_copy(family)
    plain, seen = watch(loaded)
    layer = moe_layers(loaded)[-1]
    expert = int(seen[-1].experts_TK[0, 0])
    ablated = changed(loaded, Change(ablate={layer.layer: frozenset({expert})}))
    silence(loaded.model.get_submodule(layer.experts), expert)
    assert torch.equal(ablated, logits_of(loaded))
    assert not torch.equal(ablated, plain)


@pytest.mark.parametrize("family", MOE)
def test_ablating_is_zeroing_the_down_projection(family: str, own_copy: OwnCopy):
    assert_ablating_is_zeroing_the_down_projection(family, own_copy)


def test_the_ablation_check_can_fail(own_copy: OwnCopy, monkeypatch: pytest.MonkeyPatch):
    """An ablation that hands the weight on to the other experts, as removing the expert would."""
    decide = _experts._decide

    def handing_on(*args: Any) -> Any:
        experts_TK, weights_TK = decide(*args)
        return experts_TK, weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-6)

    monkeypatch.setattr(_experts, "_decide", handing_on)
    with pytest.raises(AssertionError):
        assert_ablating_is_zeroing_the_down_projection("mixtral", own_copy)


def test_ablating_what_no_token_chose_changes_nothing(moe: LoadedModel):
    ids = IDS[:1, :1]
    plain, seen = watch(moe, ids)
    unused = {
        layer.layer: frozenset(range(layer.n_experts)) - set(at.experts_TK.flatten().tolist())
        for layer, at in same_in_order(moe, seen)
    }
    assert all(unused.values())
    logits, _ = watch(moe, ids, change=Change(ablate=unused))
    assert torch.equal(logits, plain)


@pytest.mark.parametrize("family", MOE)
def test_duplicates_merge_through_a_map_without_loss(family: str, own_copy: OwnCopy):
    loaded = own_copy(family)
    maps = {}
    for layer in moe_layers(loaded):
        with torch.no_grad():
            for parameter in loaded.model.get_submodule(layer.experts).parameters():
                parameter[2] = parameter[0]
        maps[layer.layer] = torch.arange(layer.n_experts)
        maps[layer.layer][2] = 0
    plain, before = watch(loaded)
    assert any((at.experts_TK == 2).any() for at in before)
    logits, seen = watch(loaded, change=Change(expert_map=maps))
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    assert not any((at.experts_TK == 2).any() for at in seen)


@pytest.mark.parametrize("family", MOE)
def test_a_grid_is_the_model_whose_expert_was_rounded(family: str, own_copy: OwnCopy):
    loaded = own_copy(family)
    plain = logits_of(loaded)
    layer = moe_layers(loaded)[0]
    experts = loaded.model.get_submodule(layer.experts)
    scheme = IntegerScheme(bits=3, group_size=32, symmetric=False)
    rounded = changed(loaded, Change(grids={layer.layer: {1: scheme, 3: scheme}}))
    assert torch.equal(logits_of(loaded), plain)  # the weights themselves were left alone
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            for expert in (1, 3):
                weight = getattr(experts, name)[expert]
                rows_OI = weight.T if experts.is_transposed else weight
                rows_OI.copy_(quantize(rows_OI.contiguous(), scheme).dequantize())
    assert torch.equal(rounded, logits_of(loaded))
    assert not torch.equal(rounded, plain)


def test_the_models_own_top_k_changes_nothing(moe: LoadedModel):
    top_k = {layer.layer: layer.top_k for layer in moe_layers(moe)}
    assert torch.equal(changed(moe, Change(top_k=top_k)), logits_of(moe))


def test_another_top_k_is_what_the_router_then_chooses(moe: LoadedModel):
    plain, before = watch(moe)
    logits, seen = watch(moe, change=Change(top_k=1))
    assert not torch.equal(logits, plain)
    for (layer, at), own in zip(same_in_order(moe, seen), before, strict=True):
        assert at.experts_TK.shape == (IDS.numel(), 1)
        assert moe.model.get_submodule(layer.router).top_k == layer.top_k == own.experts_TK.shape[1]
    assert torch.equal(logits_of(moe), plain)


def test_top_k_and_single_outputs_go_together(moe: LoadedModel):
    assert torch.equal(changed(moe, Change(top_k=1), norms=True), changed(moe, Change(top_k=1)))


# --- what is refused ----------------------------------------------------------------------------------

REFUSED = {
    "no MoE layer": Change(ablate={17: frozenset({0})}),
    "has experts 0 to 3, not 4": Change(ablate={0: frozenset({4})}),
    "not 4 entries": Change(expert_map={0: torch.arange(3)}),
    "has experts 0 to 3, not -1": Change(expert_map={0: torch.tensor([0, 1, 2, -1])}),
    "1 to 4 experts per token, not 5": Change(top_k=5),
    "1 to 4 experts per token, not 0": Change(top_k={0: 0}),
    "does not divide": Change(grids={0: {0: IntegerScheme(bits=4, group_size=48, symmetric=True)}}),
    "rows": Change(replay={0: (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2))}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_a_change_that_does_not_fit_is_refused_and_nothing_is_left_behind(said: str):
    loaded = tiny_model("mixtral")
    plain, before = logits_of(loaded), loaded.model.get_experts_implementation()
    with pytest.raises(BadInput, match=said):
        changed(loaded, REFUSED[said])
    assert loaded.model.get_experts_implementation() == before
    assert torch.equal(logits_of(loaded), plain)


def test_a_router_of_groups_cannot_choose_more_than_its_groups_hold():
    loaded = tiny_model("deepseek_v3")
    layer = moe_layers(loaded)[0]
    within = layer.top_groups * layer.n_experts // layer.n_groups
    assert within < layer.n_experts, "the tiny model must limit groups for this test to mean something"
    changed(loaded, Change(top_k=within))
    with pytest.raises(BadInput, match="groups"), routed(loaded, change=Change(top_k=within + 1)):
        pass
