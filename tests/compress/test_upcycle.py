"""Upcycled models are the dense ones, larger: the same function, proved to reload; what cannot be carried is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.compress._pipeline import compress
from core.errors import BadInput, BadSettings, CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.recipe import Recipe
from core.registry import get
from core.routing import _upcycling_build as build
from core.types import ModelRef, silent
from tests.compress.making import apply, own_model
from tests.tiny import D_FF, D_MODEL, LAYERS, tiny_folder

pytestmark = pytest.mark.rotating

OFFERED = {
    "llama": "MixtralForCausalLM",
    "smollm": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
}
EXACT = 1e-6


def logits(loaded: LoadedModel) -> torch.Tensor:
    """On more tokens than any attention window of the tiny models."""
    ids = torch.randint(512, (2, 96), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output: torch.Tensor = loaded.model(input_ids=ids).logits
    return output


def gap(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


def edited_model(family: str, folder: Path, **config: Any) -> LoadedModel:
    """A tiny model of ``family`` whose config says something else; new tensors are drawn, others kept."""
    base = tiny_folder(family, folder / "plain")
    auto: Any = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_pretrained(base, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    for path in base.glob("tokenizer*"):
        (folder / "edited").mkdir(exist_ok=True)
        (folder / "edited" / path.name).write_bytes(path.read_bytes())
    model.save_pretrained(folder / "edited")
    return open_model(ModelRef(str(folder / "edited")))


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("family", OFFERED)
def test_it_is_the_dense_model_whatever_is_chosen(family: str, top_k: int, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    before = logits(loaded)
    result = apply(loaded, "upcycle", experts=4, top_k=top_k)
    assert type(loaded.model).__name__ == OFFERED[family]
    assert (loaded.anatomy.n_experts, loaded.anatomy.experts_per_token) == (4, top_k)
    assert gap(before, logits(loaded)) <= EXACT
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap <= 2 * EXACT


@pytest.mark.slow
@pytest.mark.parametrize("family", OFFERED)
def test_it_reloads_with_plain_transformers_in_the_bytes_predicted(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    before = logits(loaded)
    made = compress(loaded, Recipe.of("upcycle", experts=4, top_k=2), None, tmp_path / "out", silent)
    assert made.proof.passed
    assert made.proof.max_logit_difference == 0
    assert made.saved.bytes == pytest.approx(made.saved.predicted_bytes, rel=1e-3)
    auto: Any = transformers.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        ids = torch.randint(512, (2, 96), generator=torch.Generator().manual_seed(3))
        assert gap(before, again(input_ids=ids).logits) <= EXACT


def test_it_grows_by_the_copies_and_routers_and_says_so(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    dense = sum(p.numel() for p in loaded.model.parameters())
    result = apply(loaded, "upcycle", experts=4, top_k=2)
    metrics = {metric.name: metric.value for metric in result.metrics}
    mlp = LAYERS * 3 * D_MODEL * D_FF
    routers = LAYERS * 4 * D_MODEL
    assert metrics["bytes_after"] == 4 * (dense + 3 * mlp + routers)
    assert metrics["active_parameters"] == dense + mlp + routers
    assert metrics["size_ratio"] > 2
    assert any("larger than before" in note for note in result.notes)
    assert not any("smaller" in note for note in result.notes)


def test_dropping_draws_the_stated_share_of_each_expert_anew(tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    dense = loaded.model.model.layers[1].mlp.gate_proj.weight.clone()
    before = logits(loaded)
    result = apply(loaded, "upcycle", experts=3, top_k=1, drop=0.5, seed=1)
    gate_up = loaded.model.model.layers[1].mlp.experts.gate_up_proj
    changed = (gate_up[:, :D_FF] != dense).any(-1)
    assert changed.sum(-1).tolist() == [D_FF // 2] * 3
    assert not torch.equal(changed[0], changed[1])
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap <= 2 * EXACT  # of the copies, before the drop
    assert gap(before, logits(loaded)) > 0.05
    assert any("random now" in note for note in result.notes)


def test_the_seed_decides_and_routers_are_small(tmp_path: Path) -> None:
    routers = []
    for number, seed in enumerate((0, 0, 1)):
        loaded = own_model("qwen3", tmp_path / str(number))
        apply(loaded, "upcycle", experts=4, top_k=2, seed=seed)
        routers.append(loaded.model.model.layers[2].mlp.gate.weight.clone())
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert float(routers[0].std()) == pytest.approx(0.02, rel=0.1)


def test_the_result_can_be_trained(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    with torch.inference_mode():  # as the pipeline runs it
        apply(loaded, "upcycle", experts=4, top_k=2)
    loaded.model.requires_grad_(True)
    ids = torch.arange(40)[None]
    loaded.model(input_ids=ids, labels=ids).loss.backward()
    mlp = loaded.model.model.layers[0].mlp
    assert float(mlp.experts.down_proj.grad.abs().sum()) > 0
    assert mlp.gate.weight.grad is not None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=["llama3", "yarn"],
)  # fmt: skip
def test_scaled_rotary_positions_are_carried_over(rope: dict[str, Any], tmp_path: Path) -> None:
    loaded = edited_model("llama", tmp_path, rope_parameters=rope)
    before = logits(loaded)
    apply(loaded, "upcycle", experts=2, top_k=1)
    assert loaded.model.config.rope_parameters["rope_type"] == rope["rope_type"]
    assert gap(before, logits(loaded)) <= EXACT


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_every_layer_are_carried_over_where_they_can_be(family: str, tmp_path: Path) -> None:
    """Qwen2-MoE has windows layer by layer; Qwen3-MoE in all layers or none."""
    every = edited_model(
        family, tmp_path / "every", use_sliding_window=True, sliding_window=16,
        layer_types=["sliding_attention"] * LAYERS,
    )  # fmt: skip
    before = logits(every)
    apply(every, "upcycle")
    assert every.anatomy.windows == (16,) * LAYERS
    assert gap(before, logits(every)) <= EXACT
    some = edited_model(
        family, tmp_path / "some", use_sliding_window=True, sliding_window=16,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    before = logits(some)
    if family == "qwen3":
        with pytest.raises(CannotCompress, match="its windows would be"):
            apply(some, "upcycle")
        assert type(some.model).__name__ == "Qwen3ForCausalLM"
    else:
        apply(some, "upcycle")
        assert gap(before, logits(some)) <= EXACT


def test_biases_without_a_place_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CannotCompress, match=r"layers\.0\.self_attn\.\w_proj\.bias has no place"):
        apply(edited_model("llama", tmp_path / "attention", attention_bias=True), "upcycle")
    with pytest.raises(CannotCompress, match=r"layers\.0\.mlp\.gate_proj has a bias"):
        apply(edited_model("llama", tmp_path / "mlp", mlp_bias=True), "upcycle")


def test_attention_biases_with_a_place_are_carried_over(tmp_path: Path) -> None:
    loaded = edited_model("qwen3", tmp_path, attention_bias=True)
    before = logits(loaded)
    apply(loaded, "upcycle")
    assert loaded.model.model.layers[0].self_attn.o_proj.bias is not None
    assert gap(before, logits(loaded)) <= EXACT


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "gemma2"])
def test_families_without_a_relative_are_refused_by_name(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    with pytest.raises(
        CannotCompress, match=f"like {loaded.anatomy.architecture}.* llama, mistral, qwen2, qwen3"
    ):
        apply(loaded, "upcycle")


def test_a_mixture_is_refused_and_more_chosen_than_there_are(tmp_path: Path) -> None:
    mixture = own_model("mixtral", tmp_path)
    with pytest.raises(BadInput, match="upcycle needs dense"):
        compress(mixture, Recipe.of("upcycle"), None, tmp_path / "out", silent)
    with pytest.raises(BadSettings, match="cannot be routed to 3 of 2 experts"):
        get("compress", "upcycle").parse({"experts": 2, "top_k": 3})
    quantized = own_model("llama", tmp_path / "quantized")
    apply(quantized, "rtn", bits=8)
    with pytest.raises(CannotCompress, match="quantize last"):
        apply(quantized, "upcycle")


def test_another_computation_behind_the_same_names_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: a config value that no tensor and no fact shows."""
    carried = build._carried
    monkeypatch.setattr(build, "_carried", lambda *args: _with_other_epsilon(carried(*args)))
    loaded = own_model("llama", tmp_path)
    with pytest.raises(CannotCompress, match=r"outputs would differ by .*computed otherwise"):
        apply(loaded, "upcycle")
    assert type(loaded.model).__name__ == "LlamaForCausalLM"


def _with_other_epsilon(config: Any) -> Any:
    config.rms_norm_eps = 0.1
    return config


def test_rotary_frequencies_are_compared_not_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = build._carried

    def other_base(*args: Any) -> Any:
        config = carried(*args)
        config.rope_parameters = {**config.rope_parameters, "rope_theta": 20000.0}
        return config

    monkeypatch.setattr(build, "_carried", other_base)
    with pytest.raises(CannotCompress, match="rotary positions would be scaled otherwise"):
        apply(own_model("llama", tmp_path), "upcycle")


@pytest.mark.slow
def test_its_experts_can_be_quantized_next(tmp_path: Path) -> None:
    steps = [
        {"method": "upcycle", "settings": {"experts": 2, "top_k": 1}},
        {"method": "rtn", "settings": {"bits": 4}},
    ]
    loaded = own_model("qwen2", tmp_path)  # with its shared expert of zeros
    made = compress(loaded, Recipe.parse({"steps": steps}), None, tmp_path / "out", silent)
    assert made.proof.passed
    assert made.saved.format.startswith("int4")
