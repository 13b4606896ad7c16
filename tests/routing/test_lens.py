"""The lens sees what is really used, leaves the model as it is, and computes what the model computes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from core.capture import HookDidNotFire
from core.errors import BadInput, SlimscopeError
from core.models.loaded import LoadedModel
from core.routing import _experts
from core.routing.discover import MoeLayer, moe_layers
from core.routing.lens import IMPLEMENTATION, NOTHING, Change, Routed, routed
from core.routing.rules import decide
from core.routing.scores import CHOSEN_BY_LOGIT
from tests.references.slow_lens import expert_output
from tests.tiny import MOE, n_hooks, tiny_model

IDS = torch.randint(0, 500, (2, 19), generator=torch.Generator().manual_seed(3))
"""Two rows of 19 tokens."""


def logits_of(loaded: LoadedModel, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(input_ids=ids, use_cache=False, **kwargs).logits


def watch(loaded: LoadedModel, ids: torch.Tensor = IDS, mask: torch.Tensor | None = None, **how: Any) -> Any:
    """(logits, one Routed per layer)."""
    seen: list[Routed] = []
    given = {} if mask is None else {"attention_mask": mask}
    with routed(loaded, seen.append, mask_BP=mask, **how):
        logits = logits_of(loaded, ids, **given)
    return logits, seen


def same_in_order(loaded: LoadedModel, seen: list[Routed]) -> list[tuple[MoeLayer, Routed]]:
    return list(zip(moe_layers(loaded), seen, strict=True))


@pytest.fixture(params=MOE)
def moe(request: pytest.FixtureRequest) -> LoadedModel:
    torch.set_num_threads(1)
    return tiny_model(request.param)


# --- watching -----------------------------------------------------------------------------------------


def test_watching_leaves_logits_hooks_and_implementation_as_they_were(moe: LoadedModel):
    plain, hooks = logits_of(moe), n_hooks(moe.model)
    implementation = moe.model.get_experts_implementation()
    logits, seen = watch(moe)
    assert torch.equal(logits, plain)
    assert torch.equal(logits_of(moe), plain)
    assert n_hooks(moe.model) == hooks
    assert moe.model.get_experts_implementation() == implementation
    assert [at.layer for at in seen] == [layer.layer for layer in moe_layers(moe)]


def test_loads_sum_to_tokens_times_k(moe: LoadedModel):
    for layer, at in same_in_order(moe, watch(moe)[1]):
        load = torch.bincount(at.experts_TK.flatten(), minlength=layer.n_experts)
        assert load.sum() == IDS.numel() * layer.top_k
        assert at.experts_TK.dtype == torch.int64
        assert at.weights_TK.dtype == torch.float32
        assert all(len(set(row.tolist())) == layer.top_k for row in at.experts_TK)


def assert_decision_is_the_routers(layer: MoeLayer, router: Any, at: Routed) -> None:
    assert at.logits_TE is not None
    experts_TK, weights_TK = decide(layer, router, at.logits_TE)
    assert torch.equal(at.experts_TK.sort(-1).values, experts_TK.sort(-1).values)
    in_order = torch.zeros_like(at.logits_TE).scatter(-1, experts_TK, weights_TK)
    torch.testing.assert_close(in_order.gather(-1, at.experts_TK), at.weights_TK, rtol=1e-5, atol=1e-6)


def test_captured_decision_is_what_the_rule_makes_of_the_logits(moe: LoadedModel):
    for layer, at in same_in_order(moe, watch(moe)[1]):
        assert_decision_is_the_routers(layer, moe.model.get_submodule(layer.router), at)


def top_k_of_logits(at: Routed, k: int) -> torch.Tensor:
    return at.logits_TE.topk(k).indices.sort(-1).values


def test_captured_is_the_top_k_of_the_logits_where_the_rule_says_so_and_only_there(moe: LoadedModel):
    pairs = same_in_order(moe, watch(moe)[1])
    equal = [
        torch.equal(top_k_of_logits(at, layer.top_k), at.experts_TK.sort(-1).values) for layer, at in pairs
    ]
    by_logit = [layer.rule in CHOSEN_BY_LOGIT for layer, _ in pairs]
    assert equal == by_logit  # a capture that took the top-k of the logits would fail on DeepSeek-V3


def test_routing_weights_sum_as_the_rule_says(moe: LoadedModel):
    for layer, at in same_in_order(moe, watch(moe)[1]):
        sums = at.weights_TK.sum(-1)
        if layer.rule.endswith("renorm") or layer.rule == "topk_softmax":
            torch.testing.assert_close(sums, torch.full_like(sums, layer.scale), rtol=1e-5, atol=0)
        else:
            assert layer.rule == "softmax_topk"
            assert bool((sums < 1).all())
            assert bool((sums > layer.top_k / layer.n_experts).all())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_changes_no_decision(moe: LoadedModel, side: str):
    short, n_pad = IDS[1:, :12], 7
    pad = torch.zeros(1, n_pad, dtype=torch.long)
    row = torch.cat([pad, short] if side == "left" else [short, pad], dim=1)
    mask = torch.ones(2, IDS.shape[1], dtype=torch.long)
    mask[1, slice(0, n_pad) if side == "left" else slice(12, None)] = 0
    _, seen = watch(moe, torch.cat([IDS[:1], row]), mask)
    _, alone = watch(moe, short)
    for (layer, at), by_itself in zip(same_in_order(moe, seen), alone, strict=True):
        assert torch.equal(at.valid_T, mask.flatten().bool())
        assert torch.equal(at.experts_TK[~at.valid_T], torch.full((n_pad, layer.top_k), -1))
        assert not at.weights_TK[~at.valid_T].any()
        assert int((at.experts_TK >= 0).sum()) == int(mask.sum()) * layer.top_k
        second = at.valid_T & (torch.arange(2 * IDS.shape[1]) >= IDS.shape[1])
        assert torch.equal(at.experts_TK[second], by_itself.experts_TK)
        torch.testing.assert_close(at.weights_TK[second], by_itself.weights_TK, rtol=1e-3, atol=1e-4)


def test_the_padding_check_can_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_experts, "_rows", lambda lens, n, device: torch.ones(n, dtype=torch.bool))
    with pytest.raises(AssertionError):
        test_padding_is_masked_and_changes_no_decision(tiny_model("mixtral"), "right")


def test_a_cached_decoding_step_takes_the_last_column_of_the_mask():
    loaded = tiny_model("mixtral")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.inference_mode():
        prompt = loaded.model(input_ids=IDS[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        seen: list[Routed] = []
        with routed(loaded, seen.append, mask_BP=mask):
            loaded.model(input_ids=IDS[:, -1:], attention_mask=mask, past_key_values=prompt.past_key_values)
    _, whole = watch(loaded, mask=mask)
    for at, before in zip(seen, whole, strict=True):
        assert torch.equal(at.experts_TK, before.experts_TK.view(2, IDS.shape[1], -1)[:, -1])


def test_sentinels_of_expert_parallelism_reach_no_expert(monkeypatch: pytest.MonkeyPatch):
    """Such a rank is given ids ≥ E, with weight 0, for the experts of other ranks."""
    loaded = tiny_model("mixtral")
    layer = moe_layers(loaded)[0]
    experts = loaded.model.get_submodule(layer.experts)
    monkeypatch.setattr(experts, "_is_expert_parallel", True)

    def elsewhere(module: Any, args: tuple[Any, ...]) -> Any:
        hidden_TD, experts_TK, weights_TK = args
        gone_TK = experts_TK == 1
        return hidden_TD, experts_TK.masked_fill(gone_TK, 4), weights_TK.masked_fill(gone_TK, 0)

    hook = experts.register_forward_pre_hook(elsewhere)
    try:
        plain = logits_of(loaded)
        logits, seen = watch(loaded)
        replaced, also = watch(loaded, norms=True)
    finally:
        hook.remove()
    assert torch.equal(plain, logits)
    torch.testing.assert_close(replaced, plain, rtol=1e-4, atol=1e-4)
    for at in (seen[0], also[0]):
        assert set(at.experts_TK.unique().tolist()) == {-1, 0, 2, 3}
        assert not at.weights_TK[at.experts_TK == -1].any()
    assert not also[0].norms_TK[also[0].experts_TK == -1].any()


def test_a_layer_that_never_runs_is_an_error():
    with pytest.raises(HookDidNotFire, match="never ran"), routed(tiny_model("olmoe"), lambda at: None):
        pass


def test_a_dense_model_is_refused():
    with pytest.raises(BadInput, match="dense"), routed(tiny_model("llama")):
        pass


# --- single experts' outputs --------------------------------------------------------------------------


def assert_lens_computes_the_layer(loaded: LoadedModel) -> None:
    plain = logits_of(loaded)
    logits, seen = watch(loaded, norms=True, outputs=True)
    assert torch.equal(logits, plain)
    for layer, at in same_in_order(loaded, seen):
        experts = loaded.model.get_submodule(layer.experts)
        for token in range(0, IDS.numel(), 5):
            for slot, expert in enumerate(at.experts_TK[token].tolist()):
                slow_D = expert_output(experts, expert, at.hidden_TD[token])
                torch.testing.assert_close(at.outputs_TKD[token, slot], slow_D, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(at.norms_TK[token, slot], slow_D.norm(), rtol=1e-4, atol=1e-4)


def test_our_implementation_is_the_default_one_and_its_outputs_are_the_experts(moe: LoadedModel):
    assert_lens_computes_the_layer(moe)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_it_calls_whatever_implementation_the_model_had(implementation: str):
    for family in ("mixtral", "gpt_oss", "deepseek_v3"):
        loaded = tiny_model(family)
        before = loaded.model.get_experts_implementation()
        loaded.model.set_experts_implementation(implementation)
        try:
            plain = logits_of(loaded)
            logits, _ = watch(loaded, norms=True)
            torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
            assert set(loaded.model.get_experts_implementation().values()) == {implementation}
        finally:
            loaded.model.set_experts_implementation(before)


def test_bfloat16_is_bit_equal_too(own_copy: Any):
    for family in ("mixtral", "gpt_oss"):
        loaded = own_copy(family, dtype="bfloat16")
        plain = logits_of(loaded)
        _, seen = watch(loaded)
        replay = Change(replay={at.layer: (at.experts_TK, at.weights_TK) for at in seen})
        assert torch.equal(watch(loaded, norms=True)[0], plain)
        assert torch.equal(watch(loaded, change=replay)[0], plain)


def test_the_output_check_can_fail(monkeypatch: pytest.MonkeyPatch):
    """A lens that forgets the experts' biases, as one that read gpt-oss by another family's layout would."""
    one_by_one = _experts._one_by_one

    def without_bias(own: Any, module: Any, *args: Any) -> Any:
        module.has_bias = False
        try:
            return one_by_one(own, module, *args)
        finally:
            module.has_bias = True

    monkeypatch.setattr(_experts, "_one_by_one", without_bias)
    with pytest.raises(AssertionError):
        assert_lens_computes_the_layer(tiny_model("gpt_oss"))


# --- whose thread -------------------------------------------------------------------------------------


def test_threads_do_not_see_each_others_changes():
    """One model is changed in a thread while another thread runs it, and a third changes another model."""
    first, second = tiny_model("mixtral"), tiny_model("qwen2_moe")
    plain = {loaded.ref.source: logits_of(loaded) for loaded in (first, second)}
    changes = {
        loaded.ref.source: Change(ablate={layer.layer: frozenset({0, 1}) for layer in moe_layers(loaded)})
        for loaded in (first, second)
    }
    alone = {
        loaded.ref.source: watch(loaded, change=changes[loaded.ref.source])[0] for loaded in (first, second)
    }
    inside, done = threading.Barrier(3), threading.Barrier(3)
    found: dict[str, Any] = {}

    def changed(loaded: LoadedModel) -> None:
        seen: list[Routed] = []
        with routed(loaded, seen.append, change=changes[loaded.ref.source]):
            inside.wait(30)
            found[loaded.ref.source] = logits_of(loaded)
            found[f"calls {loaded.ref.source}"] = len(seen)
            done.wait(30)

    def bystander() -> None:
        inside.wait(30)
        found["bystander"] = logits_of(first)
        done.wait(30)

    threads = [threading.Thread(target=changed, args=(loaded,)) for loaded in (first, second)]
    threads.append(threading.Thread(target=bystander))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.equal(found["bystander"], plain[first.ref.source])
    for loaded in (first, second):
        assert torch.equal(found[loaded.ref.source], alone[loaded.ref.source])
        assert not torch.equal(found[loaded.ref.source], plain[loaded.ref.source])
        assert found[f"calls {loaded.ref.source}"] == len(moe_layers(loaded))
        assert torch.equal(logits_of(loaded), plain[loaded.ref.source])


def test_one_model_is_watched_once():
    loaded = tiny_model("olmoe")
    with pytest.raises(SlimscopeError, match="watched already"), routed(loaded), routed(loaded):
        pass
    assert torch.equal(watch(loaded)[0], logits_of(loaded))


def test_an_error_inside_leaves_the_model_as_it_was(moe: LoadedModel):
    plain, hooks = logits_of(moe), n_hooks(moe.model)
    before = moe.model.get_experts_implementation()

    def fail(at: Routed) -> None:
        raise ZeroDivisionError

    for change in (NOTHING, Change(top_k=1, ablate={moe_layers(moe)[0].layer: frozenset({0})})):
        with pytest.raises(ZeroDivisionError):
            watch_failing(moe, fail, change)
    assert moe.model.get_experts_implementation() == before != {"": IMPLEMENTATION}
    assert n_hooks(moe.model) == hooks
    assert not _experts.OWN
    assert not _experts.ACTIVE.get()
    assert torch.equal(logits_of(moe), plain)


def watch_failing(loaded: LoadedModel, observe: Any, change: Change) -> None:
    with routed(loaded, observe, change=change):
        logits_of(loaded)
