"""Experts side by side are the mixture where its gates never change; elsewhere the error is the least there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.capture import capture
from core.compress import _constant_gates
from core.compress._pipeline import compress
from core.errors import BadInput, CannotCompress
from core.models.loaded import LoadedModel
from core.recipe import Recipe
from core.registry import get
from core.routing._upcycling import constant_gates
from core.train._residuals import cut_text
from core.types import Documents, Result, silent
from tests.compress.making import own_model
from tests.tiny import CORPUS, LAYERS

pytestmark = pytest.mark.rotating

OFFERED = {
    "mixtral": "MistralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2ForCausalLM",
    "qwen3_moe": "Qwen3ForCausalLM",
    "granitemoe": "GraniteForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
TEXT = Documents("corpus", "calibration", CORPUS)
EXACT = 1e-6


def densify(loaded: LoadedModel, **settings: Any) -> Result:
    chosen = get("compress", "densify")
    result: Result = chosen.run(loaded, TEXT, silent, chosen.parse({"max_tokens": 128, **settings}))
    return result


def logits(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.randint(512, (2, 96), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output: torch.Tensor = loaded.model(input_ids=ids).logits
    return output


def gap(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


def with_constant_gates(family: str, folder: Path) -> LoadedModel:
    """A mixture whose routers read nothing: the same experts with the same weights for every token."""
    loaded = own_model(family, folder)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith((".gate.weight", ".router.weight", ".shared_expert_gate.weight")):
                parameter.zero_()
    return loaded


@pytest.mark.parametrize("gates", ["fitted", "mean"])
@pytest.mark.parametrize("family", OFFERED)
def test_it_is_the_mixture_where_gates_are_constant(family: str, gates: str, tmp_path: Path) -> None:
    loaded = with_constant_gates(family, tmp_path)
    before = logits(loaded)
    result = densify(loaded, select="frequency", gates=gates)
    assert type(loaded.model).__name__ == OFFERED[family]
    assert loaded.anatomy.n_experts == (1 if family == "olmoe" else 0)
    assert gap(before, logits(loaded)) <= EXACT
    assert {m.name: m.value for m in result.metrics}["missing_of_mlp_output"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", OFFERED)
def test_it_reloads_with_plain_transformers(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    made = compress(loaded, Recipe.of("densify", experts=3, max_tokens=128), TEXT, tmp_path / "out", silent)
    assert made.proof.passed
    assert made.proof.max_logit_difference == 0
    assert made.saved.bytes == pytest.approx(made.saved.predicted_bytes, rel=1e-3)
    assert made.result.provenance.exactness_gap is not None
    assert made.result.provenance.exactness_gap <= 2 * EXACT


def test_sums_and_error_are_those_of_one_token_at_a_time(tmp_path: Path) -> None:
    loaded = own_model("qwen2_moe", tmp_path)
    parts = cut_text(loaded, TEXT, window=40, max_tokens=120)
    experts = [_constant_gates.expert_mlp(loaded, 1, e) for e in (3, 0)]
    with torch.inference_mode():
        found = _constant_gates.gather_moments(loaded, {1: experts}, parts.training, silent)[1]
    gram, moment, power, tokens = torch.zeros(2, 2).double(), torch.zeros(2).double(), 0.0, []
    for window in parts.training:
        path = "model.layers.1.mlp"
        with (
            torch.no_grad(),
            capture(loaded.model, [path], inputs=True) as read,
            capture(loaded.model, [path]) as given,
        ):
            loaded.model(input_ids=torch.tensor([window.ids]))
        for token, wanted in zip(read[path][0], given[path][0].double(), strict=True):
            outs = [
                (m.down_DI @ (torch.nn.functional.silu(m.gate_ID @ token) * (m.up_ID @ token))).double()
                for m in experts
            ]
            gram += torch.tensor([[float(a @ b) for b in outs] for a in outs]).double()
            moment += torch.tensor([float(a @ wanted) for a in outs]).double()
            power += float(wanted @ wanted)
            tokens.append((outs, wanted))
    torch.testing.assert_close(found.gram_MM, gram, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.moment_M, moment, rtol=1e-5, atol=1e-4)
    gates = constant_gates(found.gram_MM, found.moment_M)
    missing = sum(
        float((w - sum(c * o for c, o in zip(gates, outs, strict=True))).square().sum()) for outs, w in tokens
    )
    assert found.relative_error(gates) == pytest.approx((missing / power) ** 0.5, rel=1e-4)


def test_fitted_gates_err_least_on_the_text_they_were_fitted_on(tmp_path: Path) -> None:
    loaded = own_model("mixtral", tmp_path)
    windows = cut_text(loaded, TEXT, window=64, max_tokens=200).training
    mlps = [_constant_gates.expert_mlp(loaded, 0, e) for e in range(4)]
    with torch.inference_mode():
        moments = _constant_gates.gather_moments(loaded, {0: mlps}, windows, silent)[0]
    best = constant_gates(moments.gram_MM, moments.moment_M)
    made = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = best + 0.1 * torch.randn(4, generator=made, dtype=torch.float64)
        assert moments.relative_error(best) < moments.relative_error(other)


def test_layers_that_were_dense_stay_and_narrower_ones_are_filled_up(tmp_path: Path) -> None:
    loaded = own_model("qwen3_moe", tmp_path)  # layer 1 is dense, 256 wide; two experts of 64 are 128
    dense = {name: p.clone() for name, p in loaded.model.model.layers[1].mlp.named_parameters()}
    densify(loaded, experts=2)
    layers = loaded.model.model.layers
    assert len(layers) == LAYERS
    for name, parameter in layers[1].mlp.named_parameters():
        assert torch.equal(parameter, dense[name])
    assert not layers[0].mlp.gate_proj.weight[128:].any()
    assert not layers[0].mlp.down_proj.weight[:, 128:].any()
    assert layers[0].mlp.gate_proj.weight[:128].any(1).all()


def test_the_experts_with_the_highest_scores_stay(tmp_path: Path) -> None:
    result = densify(own_model("olmoe", tmp_path / "a"), select="frequency", experts=1)
    load = densify(own_model("olmoe", tmp_path / "b"), select="frequency", experts=4).frames["experts"]
    for _, line in result.frames["experts"].iterrows():
        of_layer = load[load["layer"] == line["layer"]]
        assert line["share_of_tokens"] == of_layer["share_of_tokens"].max()


@pytest.mark.parametrize(
    ("family", "why"),
    [("gpt_oss", "have biases"), ("jamba", "Mamba"), ("llama4", "scales what its experts read")],
)
def test_families_without_a_dense_relative_are_refused_by_name(family: str, why: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    with pytest.raises(CannotCompress, match=rf"like {loaded.anatomy.architecture}: .*{why}"):
        densify(loaded)


def test_a_dense_model_is_refused_and_more_experts_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="densify needs moe"):
        compress(own_model("llama", tmp_path), Recipe.of("densify"), TEXT, tmp_path / "out", silent)
    with pytest.raises(CannotCompress, match="experts=5, but every layer has 4"):
        densify(own_model("mixtral", tmp_path / "mixtral"), experts=5)
