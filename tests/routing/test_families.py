"""Every family's experts are found, their rule is known and holds, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from core.errors import BadInput, CannotMeasure, CannotOpen
from core.models.anatomy_find import find_anatomy
from core.models.loaded import LoadedModel
from core.registry import get
from core.routing import passport as passport_module
from core.routing.discover import MoeLayer, moe_layers, neutral_when_unused
from core.routing.lens import Change, Routed, routed
from core.routing.passport import passport
from core.routing.rules import ALWAYS, BY_TOPK_METHOD, IF_NORM_TOPK_PROB, decide, rule_of
from core.types import Prompt, silent
from tests.references.slow_routers import deepseek_v3, softmax_topk
from tests.tiny import HEADLESS, MOE, SHIMMED, tiny_model

EVERY = (*MOE, *SHIMMED)
IDS = torch.randint(0, 500, (2, 19), generator=torch.Generator().manual_seed(5))
RULES = {
    "mixtral": "softmax_topk_renorm",
    "olmoe": "softmax_topk",
    "qwen3_moe": "softmax_topk",
    "qwen2_moe": "softmax_topk",
    "granitemoe": "topk_softmax",
    "gpt_oss": "topk_softmax",
    "deepseek_v3": "sigmoid_bias_renorm",
    "jamba": "softmax_topk",
    "llama4": "topk_sigmoid",
}
SHARED = ("qwen2_moe", "deepseek_v3", "llama4")


# --- where the experts are ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_layers_are_those_of_the_anatomy(family: str) -> None:
    loaded = tiny_model(family)
    found = moe_layers(loaded)
    blocks = [block for block in loaded.anatomy.blocks if block.is_moe]
    assert [(at.layer, at.block, at.mlp, at.router, at.experts, at.shared) for at in found] == [
        (b.index, b.path, b.mlp, b.router, b.experts, b.shared_expert) for b in blocks
    ]
    for at in found:
        assert (at.n_experts, at.top_k) == (loaded.anatomy.n_experts, loaded.anatomy.experts_per_token)
        assert (at.shared is not None) == (family in SHARED)
        assert (at.shared_gate is not None) == (family == "qwen2_moe")
        assert (at.n_groups, at.top_groups, at.scale) == (
            (4, 2, 2.5) if family == "deepseek_v3" else (1, 1, 1)
        )
        assert at.rule == RULES[family]
        assert at.shim == (family in SHIMMED)


def test_a_dense_model_has_no_layers() -> None:
    assert moe_layers(tiny_model("llama")) == ()
    assert passport(tiny_model("llama"))["layers"] == []


# --- rules ----------------------------------------------------------------------------------------------


@cache
def _sources() -> dict[Path, str]:
    root = Path(transformers.__file__).parent / "models"
    return {path: path.read_text() for path in root.glob("*/modeling_*.py")}


def _router(name: str, **attributes: Any) -> Any:
    """A router of transformers by its class name, alone, with random weights."""
    path = next(path for path, text in _sources().items() if re.search(rf"class {name}\(", text))
    module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
    config = SimpleNamespace(
        **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 8),
        **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 3),
        hidden_size=16,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        **attributes,
    )
    router = getattr(module, name)(config)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data = torch.randn(tensor.shape, generator=generator)
    return router


CLASSES = [
    *((name, {}) for name in ALWAYS if name not in ("HunYuanMoEV1Gate", "Llama4Router")),
    *((name, {"norm_topk_prob": norm}) for name in IF_NORM_TOPK_PROB for norm in (False, True)),
    *((name, {"topk_method": how}) for name in BY_TOPK_METHOD for how in ("greedy", "group_limited_greedy")),
]


@pytest.mark.parametrize(("name", "attributes"), CLASSES)
def test_a_known_rule_gives_the_routers_decision(name: str, attributes: dict[str, Any]) -> None:
    router = _router(name, **attributes)
    read_TD = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits_TE, weights_TK, experts_TK = router(read_TD)
        rule = rule_of(router)
        grouped = rule not in ("softmax_topk", "softmax_topk_renorm", "topk_softmax")
        layer = dataclasses.replace(
            moe_layers(tiny_model("mixtral"))[0],
            n_experts=8,
            top_k=3,
            n_groups=router.num_group if grouped and hasattr(router, "num_group") else 1,
            top_groups=router.topk_group if grouped and hasattr(router, "topk_group") else 1,
            rule=rule,
            scale=getattr(router, "routed_scaling_factor", 1.0),
        )
        chosen_TK, computed_TK = decide(layer, router, logits_TE)
    empty_TE = torch.zeros(200, 8)
    torch.testing.assert_close(
        empty_TE.scatter(-1, chosen_TK, computed_TK), empty_TE.scatter(-1, experts_TK, weights_TK.float())
    )


def test_the_rule_of_an_unknown_router_is_unknown() -> None:
    router = _router("Mistral4TopkRouter", norm_topk_prob=True)
    assert rule_of(router) == "unknown"
    layer = dataclasses.replace(moe_layers(tiny_model("mixtral"))[0], rule="unknown", router_class="Foo")
    with pytest.raises(ValueError, match=r"mlp\.gate: Foo follows no rule known here"):
        decide(layer, router, torch.zeros(2, 4))
    assert not neutral_when_unused(layer)


def _watched(loaded: LoadedModel) -> list[tuple[MoeLayer, Routed]]:
    seen: list[Routed] = []
    with loaded.lock, torch.inference_mode(), routed(loaded, seen.append):
        loaded.model(input_ids=IDS, use_cache=False)
    return list(zip(moe_layers(loaded), seen, strict=True))


def test_deepseek_v3_chooses_by_its_formula_and_not_by_its_logits() -> None:
    loaded = tiny_model("deepseek_v3")
    naive = 0
    for layer, at in _watched(loaded):
        bias = loaded.model.get_submodule(layer.router).e_score_correction_bias.tolist()
        assert any(bias)
        for logits, experts, weights in zip(at.logits_TE, at.experts_TK, at.weights_TK, strict=True):
            expected = deepseek_v3(logits.tolist(), bias, top_k=2, n_groups=4, top_groups=2, scale=2.5)
            assert dict(zip(experts.tolist(), weights.tolist(), strict=True)) == pytest.approx(expected)
            naive += set(logits.topk(2).indices.tolist()) != set(experts.tolist())
    assert naive > 0  # the bias and the groups matter: top-k of the logits would have been wrong


@pytest.mark.parametrize(
    "family", ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "jamba", "gpt_oss", "granitemoe"]
)
def test_softmax_families_choose_the_largest_logits(family: str) -> None:
    renormalised = RULES[family] in ("softmax_topk_renorm", "topk_softmax")
    for layer, at in _watched(tiny_model(family)):
        for logits, experts, weights in zip(at.logits_TE, at.experts_TK, at.weights_TK, strict=True):
            expected = softmax_topk(logits.tolist(), top_k=layer.top_k, renormalised=renormalised)
            assert dict(zip(experts.tolist(), weights.tolist(), strict=True)) == pytest.approx(
                expected, abs=1e-6
            )


# --- Llama-4's shim ---------------------------------------------------------------------------------------


def test_llama4s_decision_is_what_scales_its_experts_inputs() -> None:
    loaded = tiny_model("llama4")
    ((layer, at),) = _watched(loaded)
    fed: list[Any] = []
    hook = loaded.model.get_submodule(layer.experts).register_forward_pre_hook(
        lambda m, args: fed.append(args[0])
    )
    with loaded.lock, torch.inference_mode():
        loaded.model(input_ids=IDS, use_cache=False)
    hook.remove()
    scaled_ETD = fed[0].view(layer.n_experts, len(at.hidden_TD), -1)
    weights_TE = torch.zeros(len(at.hidden_TD), layer.n_experts).scatter(-1, at.experts_TK, at.weights_TK)
    torch.testing.assert_close(scaled_ETD, at.hidden_TD * weights_TE.T[..., None])
    assert torch.bincount(at.experts_TK.flatten()).sum() == IDS.numel() * layer.top_k


def test_llama4_is_watched_and_its_changes_are_refused_by_name() -> None:
    loaded = tiny_model("llama4")
    layer = moe_layers(loaded)[0].layer
    with (
        pytest.raises(BadInput, match=r"feed_forward\.experts \(Llama4TextExperts\)"),
        routed(loaded, change=Change(ablate={layer: frozenset({0})})),
    ):
        pass


# --- the passport -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_the_passport_passes_its_own_checks(family: str) -> None:
    found = passport(tiny_model(family))
    assert json.loads(json.dumps(found)) == found
    assert set(found["checks"].values()) == {True}
    for layer in found["layers"]:
        assert set(layer["checks"].values()) <= {True, None}
        assert layer["checks"]["recomputed decision is the captured one"] is True
        assert layer["rule"] == RULES[family]
        low, high = layer["weight_sum"]
        if layer["renormalised"]:
            assert low == pytest.approx(high) == pytest.approx(2.5 if family == "deepseek_v3" else 1)
        elif family != "llama4":
            assert high < 1


def test_a_wrong_rule_turns_the_passport_red(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("olmoe")
    wrong = tuple(dataclasses.replace(layer, rule="softmax_topk_renorm") for layer in moe_layers(loaded))
    monkeypatch.setattr(passport_module, "moe_layers", lambda model: wrong)
    checks = passport(loaded)["layers"][0]["checks"]
    assert checks["recomputed decision is the captured one"] is True
    assert checks["recomputed weights are the captured ones"] is False
    assert checks["weights sum to the scale"] is False


def test_an_unknown_rule_is_said_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("olmoe")
    unknown = tuple(dataclasses.replace(layer, rule="unknown") for layer in moe_layers(loaded))
    monkeypatch.setattr(passport_module, "moe_layers", lambda model: unknown)
    layer = passport(loaded)["layers"][0]
    assert layer["renormalised"] is None
    assert layer["checks"]["recomputed decision is the captured one"] is None
    assert not layer["neutral_when_unused"]


# --- neutral when unused (moe.md: the decision of the chosen must not depend on the others) ---------------


@pytest.mark.parametrize("family", MOE)
def test_removing_an_unchosen_expert_is_neutral_where_it_is_said(family: str) -> None:
    """Held on the router alone: its decision without one expert, for tokens that did not choose it."""
    loaded = tiny_model(family)
    for layer, at in _watched(loaded):
        if layer.n_groups > 1:
            assert not neutral_when_unused(layer)
            continue
        router = loaded.model.get_submodule(layer.router)
        for expert in range(layer.n_experts):
            away_T = (at.experts_TK != expert).all(-1)
            others = [e for e in range(layer.n_experts) if e != expert]
            fewer = dataclasses.replace(layer, n_experts=len(others))
            experts_TK, weights_TK = decide(fewer, router, at.logits_TE[away_T][:, others])
            kept = torch.tensor(others)[experts_TK]
            assert torch.equal(kept.sort(-1).values, at.experts_TK[away_T].sort(-1).values)
            gap = (weights_TK.sum(-1) - at.weights_TK[away_T].sum(-1)).abs().max()
            assert (gap < 1e-6) == neutral_when_unused(layer)


# --- refusals -----------------------------------------------------------------------------------------------


def _jetmoe() -> Any:
    config = transformers.JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.JetMoeForCausalLM(config)


def _switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def _nllb() -> Any:
    config = transformers.NllbMoeConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        num_experts=4,
    )
    return transformers.NllbMoeForConditionalGeneration(config)


def _dbrx() -> Any:
    config = transformers.DbrxConfig(
        d_model=32,
        n_heads=2,
        n_layers=1,
        vocab_size=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": None, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    return transformers.DbrxForCausalLM(config)


def _longcat() -> Any:
    config = transformers.LongcatFlashConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        ffn_hidden_size=24,
        expert_ffn_hidden_size=24,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    return transformers.LongcatFlashForCausalLM(config)


REFUSED = [
    (_jetmoe, r"JetMoeMoE sorts tokens by expert inside its router"),
    (_switch, r"SwitchTransformersSparseMLP drops tokens over an expert's capacity"),
    (_nllb, r"NllbMoeSparseMLP drops tokens over an expert's capacity"),
    (_dbrx, r"DbrxExperts keeps all experts in flat matrices"),
    (_longcat, r"LongcatFlashExperts mixes experts that compute with experts that pass"),
]


@pytest.mark.parametrize(("build", "reason"), REFUSED)
def test_exceptions_are_refused_with_module_and_reason(build: Any, reason: str) -> None:
    model = build()
    for find in (find_anatomy, moe_layers):
        with pytest.raises(CannotOpen, match=rf"^\w+(\.\w+)+: {reason}.*is not supported"):
            find(model)


class _OldExperts(torch.nn.ModuleList):
    """Experts as transformers 4 and remote code keep them: one module each."""


def _spoil_experts(mlp: Any) -> None:
    mlp.experts = _OldExperts([torch.nn.Linear(8, 8)])


def _spoil_router(mlp: Any) -> None:
    mlp.chooser = mlp.gate
    del mlp.gate


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_spoil_experts, r"model\.layers\.0\.mlp(\.experts)?: _OldExperts is not a fused experts module"),
        (_spoil_router, r"model\.layers\.0\.mlp: .*(no|a) router named gate or router"),
    ],
)
def test_an_unknown_family_is_refused_naming_the_module(spoil: Any, said: str) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config)
    spoil(model.model.layers[0].mlp)
    for find in (find_anatomy, moe_layers):
        with pytest.raises(CannotOpen, match=said):
            find(model)


def test_a_config_with_experts_and_no_experts_module_is_not_called_dense() -> None:
    loaded = tiny_model("llama")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_local_experts=8))
    model = SimpleNamespace(config=config, named_modules=loaded.model.named_modules)
    with pytest.raises(CannotOpen, match="names 8 experts, but no module"):
        moe_layers(model)


# --- what needs plain heads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HEADLESS)
def test_a_model_without_plain_heads_says_so(family: str) -> None:
    loaded = tiny_model(family)
    assert "heads" not in loaded.offers
    for probe in ("attention_pattern", "head_scores", "activation_patching", "direct_logit_attribution"):
        missing = loaded.missing_needs(get("probe", probe).needs)
        assert missing == ("heads",)
        with pytest.raises(BadInput, match=f"{probe} needs heads, which {family} does not offer"):
            get("probe", probe).refuse_if(missing, family)


@pytest.mark.parametrize("family", HEADLESS)
@pytest.mark.parametrize("probe", ["logit_lens", "token_surprisal", "residual_norms", "residual_map"])
def test_what_needs_no_heads_runs_without_them(family: str, probe: str) -> None:
    loaded = tiny_model(family)
    method = get("probe", probe)
    assert loaded.supports(method.needs)
    result = method.run(loaded, Prompt("The capital of France is Paris"), silent, method.parse({}))
    assert not result.frame.empty
    gap = result.provenance.exactness_gap
    assert gap is None or gap < 1e-4


def test_llama4s_neurons_are_not_split_but_refused() -> None:
    loaded = tiny_model("llama4")
    probe = get("probe", "direct_logit_attribution")
    with pytest.raises(
        CannotMeasure, match=r"layers\.1\.feed_forward\.experts computes every expert on inputs"
    ):
        probe.run(loaded, Prompt("The capital of France is"), silent, probe.parse({}))
