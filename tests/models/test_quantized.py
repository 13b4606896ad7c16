"""Checkpoints of other libraries, where those are installed, read back as the dense weights they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from core.calling import run_probe
from core.errors import CannotOpen
from core.models.open import open_model
from core.models.quantized import densify
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.tiny import tiny_folder, tiny_model


def quantized_config(library: str, bits: int) -> object:
    if library == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip(library)
    return transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)


@pytest.fixture(
    params=[("torchao", 8), ("bitsandbytes", 8), ("bitsandbytes", 4)], ids=lambda p: f"{p[0]}{p[1]}"
)
def packed(request, tmp_path: Path) -> tuple[Path, Path]:
    """A tiny model, and its copy as another library stores it."""
    config = quantized_config(*request.param)
    plain, folder = tiny_folder("llama", tmp_path / "plain"), tmp_path / "packed"
    auto = transformers.AutoModelForCausalLM
    auto.from_pretrained(plain, quantization_config=config, dtype=torch.float32).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
    return plain, folder


def test_a_packed_checkpoint_opens_dense_and_close(packed):
    plain, folder = packed
    original, opened = open_model(ModelRef(str(plain))), open_model(ModelRef(str(folder)))
    assert any("read back as dense" in note for note in opened.notes)
    anatomy = opened.anatomy
    for block in anatomy.blocks:
        weight = opened.model.get_submodule(block.down).weight
        reference = original.model.get_submodule(block.down).weight
        assert type(weight.data) is torch.Tensor
        assert weight.shape == reference.shape
        error = (weight - reference).square().mean().sqrt() / reference.square().mean().sqrt()
        assert 1e-4 < error < 0.2  # quantized, and no other weights


@pytest.mark.parametrize("probe", ["logit_lens", "input_x_gradient"])
def test_probes_run_on_it_gradients_too(packed, probe):
    _, folder = packed
    method = get("probe", probe)
    result = run_probe(
        method, open_model(ModelRef(str(folder))), Prompt("one two three"), silent, method.parse({})
    )
    assert (
        result.provenance.exactness_gap is None or result.provenance.exactness_gap < 1e-2
    )  # a central difference is no closer


@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_a_missing_library_is_named(library, tmp_path, monkeypatch):
    folder = tiny_folder("llama", tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": library}
    config.save_pretrained(folder)
    monkeypatch.setattr("core.models.open.find_spec", lambda name: None)
    with pytest.raises(CannotOpen, match=f"pip install --no-deps {library}"):
        open_model(ModelRef(str(folder)))


def test_a_config_that_promises_too_much_is_refused():
    with pytest.raises(CannotOpen, match="no layer is quantized"):
        densify(tiny_model("llama").model, "bitsandbytes")
