"""Counts against the files on disk and against sums done by hand."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest

from core.models.anatomy import Anatomy
from core.models.open import open_model
from core.models.sizes import (
    component_of,
    component_sizes,
    kv_cache_bytes,
    kv_cache_bytes_per_token,
    model_card,
    predicted_bytes,
)
from core.types import ModelRef
from tests.tiny import (
    D_FF,
    D_MODEL,
    DECODERS,
    FAMILIES,
    HEADLESS,
    KV_HEADS,
    LAYERS,
    MOE,
    SHIMMED,
    VOCAB,
    tiny_folder,
    tiny_model,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_counted_once(family: str) -> None:
    loaded = tiny_model(family)
    sizes = component_sizes(loaded)
    assert sizes["parameters"].sum() == sum(p.numel() for p in loaded.model.parameters())
    assert sizes["bytes"].sum() == 4 * sizes["parameters"].sum()
    assert sizes["share"].sum() == pytest.approx(1)
    assert not (sizes["component"] == "other").any() or family in ("bert", "vit")
    assert sizes["tied"].any() == loaded.anatomy.tied


def test_components_of_a_llama_by_hand() -> None:
    by = component_sizes(tiny_model("llama")).groupby("component")["parameters"].sum().to_dict()
    assert by == {
        "embedding": VOCAB * D_MODEL,
        "head": VOCAB * D_MODEL,
        "attention": LAYERS * (2 * D_MODEL * D_MODEL + 2 * D_MODEL * D_MODEL // 2),
        "mlp": LAYERS * 3 * D_MODEL * D_FF,
        "norm": (2 * LAYERS + 1) * D_MODEL,
    }


def test_experts_and_routers_are_counted() -> None:
    by = component_sizes(tiny_model("mixtral")).groupby("component")["parameters"].sum()
    assert by["experts"] == LAYERS * 4 * 3 * D_MODEL * D_FF
    assert by["router"] == LAYERS * 4 * D_MODEL
    assert "mlp" not in by


@pytest.mark.parametrize(
    ("family", "parameter", "component"),
    [
        ("bert", "encoder.layer.0.attention.self.query.weight", "attention"),
        ("bert", "encoder.layer.0.attention.output.dense.weight", "attention"),
        ("bert", "encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
        ("bert", "encoder.layer.0.output.dense.weight", "mlp"),
        ("bert", "embeddings.LayerNorm.weight", "norm"),
        ("bert", "pooler.dense.weight", "other"),
        ("vit", "vit.embeddings.cls_token", "embedding"),
        ("vit", "classifier.weight", "head"),
        ("opt", "model.decoder.layers.0.fc1.weight", "mlp"),
        ("opt", "model.decoder.embed_positions.weight", "embedding"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight", "norm"),
        ("gemma2", "model.layers.0.post_feedforward_layernorm.weight", "norm"),
    ],
)
def test_component_of(family: str, parameter: str, component: str) -> None:
    assert component_of(tiny_model(family).anatomy, parameter) == component


def test_kv_cache_uses_the_explicit_head_dim() -> None:
    anatomy = tiny_model("qwen3").anatomy  # 2 key/value heads of 64, not of 128 / 4
    assert kv_cache_bytes_per_token(anatomy, dtype_bytes=2, context=10) == 2 * LAYERS * 2 * 64 * 2


def test_kv_cache_stops_growing_in_windows() -> None:
    anatomy = tiny_model("gemma2").anatomy  # windows 16, none, 16
    per_layer = 2 * 2 * 64 * 4
    assert kv_cache_bytes(anatomy, dtype_bytes=4, context=100) == per_layer * (16 + 100 + 16)
    assert kv_cache_bytes_per_token(anatomy, dtype_bytes=4, context=15) == 3 * per_layer
    assert kv_cache_bytes_per_token(anatomy, dtype_bytes=4, context=16) == per_layer


def _tensors(layer: Any) -> list[Any]:
    """What one layer of transformers' cache holds: keys and values, or a Mamba layer's two states."""
    import torch

    if hasattr(layer, "conv_states"):
        states = (*layer.conv_states.values(), *layer.recurrent_states.values())
        return [state for state in states if torch.is_tensor(state)]
    return [layer.keys, layer.values]


@pytest.mark.parametrize("context", [12, 15])
@pytest.mark.parametrize("family", [*DECODERS, *HEADLESS, *SHIMMED])
def test_kv_cache_is_what_transformers_keeps(family: str, context: int) -> None:
    """Below every window; a latent's cache is one head as wide as the latent, a Mamba layer's does not grow."""
    import torch

    loaded = tiny_model(family)
    with torch.inference_mode():
        cache = loaded.model(torch.arange(context)[None], use_cache=True).past_key_values
    kept = sum(t.nbytes for layer in cache.layers for t in _tensors(layer))
    assert kv_cache_bytes(loaded.anatomy, dtype_bytes=4, context=context) == kept


def test_kv_cache_of_latents_and_states_by_hand() -> None:
    latent = tiny_model("deepseek_v3").anatomy
    assert kv_cache_bytes_per_token(latent, dtype_bytes=2, context=10) == LAYERS * (64 + 16) * 2
    jamba = tiny_model("jamba").anatomy
    one_layer_attends = 2 * KV_HEADS * 32 * 2
    assert kv_cache_bytes_per_token(jamba, dtype_bytes=2, context=10) == one_layer_attends
    states = 2 * (2 * D_MODEL) * (8 + 4) * 2  # two Mamba layers, twice as wide as the stream
    assert kv_cache_bytes(jamba, dtype_bytes=2, context=10) == states + 10 * one_layer_attends


ACTIVE_MLP = {
    # (all experts of a model, those one token passes): layers · experts · 3 · d · intermediate, shared ones beside
    "mixtral": (3 * 4 * 3 * D_MODEL * D_FF, 3 * 2 * 3 * D_MODEL * D_FF),
    "qwen3_moe": (2 * 4 * 3 * D_MODEL * 64, 2 * 2 * 3 * D_MODEL * 64),
    "qwen2_moe": (2 * 4 * 3 * D_MODEL * 64, 2 * 2 * 3 * D_MODEL * 64),
    "deepseek_v3": (2 * 16 * 3 * D_MODEL * 64, 2 * 2 * 3 * D_MODEL * 64),
    "jamba": (2 * 4 * 3 * D_MODEL * D_FF, 2 * 2 * 3 * D_MODEL * D_FF),
    "gpt_oss": (3 * 4 * (3 * D_MODEL * 64 + 2 * 64 + D_MODEL), 3 * 2 * (3 * D_MODEL * 64 + 2 * 64 + D_MODEL)),
    "llama4": (1 * 4 * 3 * D_MODEL * 64, 1 * 2 * 3 * D_MODEL * 64),
}


@pytest.mark.parametrize("family", ACTIVE_MLP)
def test_total_and_active_parameters_by_hand(family: str) -> None:
    """total = dense + L · E · 3 d I, active = dense + L · (k + shared) · 3 d I; shared experts are in the dense part."""
    loaded = tiny_model(family)
    card = model_card(loaded)
    by = card.components.groupby("component")["parameters"].sum()
    of_experts, chosen = ACTIVE_MLP[family]
    assert by["experts"] == of_experts
    assert card.parameters == by.sum()
    assert card.active_parameters == card.parameters - of_experts + chosen
    shared = {
        "qwen2_moe": 2 * 3 * D_MODEL * 128,
        "deepseek_v3": 2 * 3 * D_MODEL * 64,
        "llama4": 3 * D_MODEL * 64,
    }
    assert by.get("shared_expert", 0) == shared.get(family, 0)


def test_a_dense_model_is_all_active() -> None:
    card = model_card(tiny_model("llama"))
    assert card.active_parameters == card.parameters


@pytest.mark.parametrize("family", [*MOE, *SHIMMED])
def test_every_parameter_of_a_mixture_has_its_component(family: str) -> None:
    sizes = component_sizes(tiny_model(family))
    assert not (sizes["component"] == "other").any()
    assert (sizes["component"] == "router").any()


def test_an_encoder_keeps_no_cache() -> None:
    assert kv_cache_bytes(tiny_model("bert").anatomy, dtype_bytes=4, context=99) == 0
    assert model_card(tiny_model("bert")).kv_cache.empty


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_float32_is_the_file_on_disk(family: str) -> None:
    loaded = tiny_model(family)
    predicted = predicted_bytes(loaded).set_index("format").loc["float32", "bytes"]
    real = (loaded.folder / "model.safetensors").stat().st_size
    # Experts are stored one by one, so their file has a longer header than ours.
    assert predicted == pytest.approx(real, rel=0.02 if loaded.anatomy.n_experts else 0.001)


def test_predicted_bfloat16_is_what_transformers_writes(tmp_path: Path) -> None:
    loaded = open_model(ModelRef(str(tiny_folder("smollm", tmp_path / "smollm")), dtype="bfloat16"))
    loaded.model.save_pretrained(tmp_path / "saved")
    predicted = predicted_bytes(loaded).set_index("format").loc["bfloat16", "bytes"]
    assert predicted == pytest.approx((tmp_path / "saved" / "model.safetensors").stat().st_size, rel=0.001)


def test_predicted_int4_by_hand() -> None:
    frame = predicted_bytes(tiny_model("llama")).set_index(["format", "embedding_and_head"])
    on_grid = LAYERS * (3 * D_MODEL * D_MODEL + 3 * D_MODEL * D_FF)
    rest = 2 * VOCAB * D_MODEL + (2 * LAYERS + 1) * D_MODEL
    values = on_grid // 2 + on_grid // 32 * 2 + rest * 4
    header = frame.loc[("int4 g32", "kept"), "bytes"] - values
    assert 0 < header < 9000  # names, and the int64 shape of every packed tensor
    assert frame.loc[("int4 g32", "same"), "bytes"] < frame.loc[("int4 g32", "kept"), "bytes"]


def test_a_group_that_does_not_divide_has_no_number_but_a_reason() -> None:
    frame = predicted_bytes(tiny_model("qwen3_moe")).set_index(["format", "embedding_and_head"])
    row = frame.loc[("int4 g128", "kept")]
    assert row.isna()["bytes"]
    assert "128 does not divide 64 of model.layers.0.mlp.experts.down_proj" in row["note"]
    assert frame.loc[("int4 g64", "kept"), "bytes"] > 0


class _WithoutTorch(pickle.Unpickler):
    """What the UI process is: a place without torch."""

    def find_class(self, module: str, name: str) -> Any:
        assert not module.startswith(("torch", "transformers")), f"the card holds a {module}.{name}"
        return super().find_class(module, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_crosses_processes_without_a_tensor(family: str) -> None:
    card = model_card(tiny_model(family))
    back = _WithoutTorch(io.BytesIO(pickle.dumps(card))).load()
    assert isinstance(back.anatomy, Anatomy)
    assert back.parameters == card.components["parameters"].sum()
    assert back.checks
