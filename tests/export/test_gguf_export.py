"""GGUF: exact bytes, exact order of rows, exact tokens, and refusals by name."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from core.errors import CannotExport
from core.export.gguf import read_back
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Result, silent
from tests.tiny import tiny_model


def export(loaded: LoadedModel, folder: Path, **settings: str) -> Result:
    method = get("export", "gguf")
    folder.mkdir()
    result: Result = method.run(loaded, folder, silent, method.parse(settings))
    return result


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_f16_comes_back_as_the_weights_rounded_to_16_bits(family: str, tmp_path: Path):
    loaded = tiny_model(family)
    export(loaded, tmp_path / "out", type="F16", embedding_type="same")
    read = dict(read_back(tmp_path / "out").named_parameters())
    for name, parameter in loaded.model.named_parameters():
        kept = parameter if parameter.ndim < 2 else parameter.half().float()
        assert torch.equal(read[name], kept), name


def test_bytes_and_errors_are_those_of_the_formats(tmp_path: Path):
    bits = {"Q8_0": (34, 0.0053), "Q5_1": (24, 0.0379), "Q4_0": (18, 0.0860)}
    for kind, (bytes_per_block, error) in bits.items():
        rows = export(tiny_model("smollm"), tmp_path / kind, type=kind, embedding_type="same").frame
        matrices = rows[rows["format"] == kind]
        assert (matrices["bytes"] * 32 == matrices["parameters"] * bytes_per_block).all()
        assert matrices["relative_error"].to_numpy() == pytest.approx(error, rel=0.03)


def test_our_own_reader_opens_it_with_the_same_weights_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLIMSCOPE_CACHE", str(tmp_path / "cache"))
    loaded = tiny_model("smollm")
    result = export(loaded, tmp_path / "out")
    opened = open_model(ModelRef(str(tmp_path / "out" / "model.gguf")))
    parity = {m.name: m.value for m in result.metrics}
    ids = torch.arange(40)[None] % 512
    gap = float((opened.model(input_ids=ids).logits - loaded.model(input_ids=ids).logits).abs().max())
    assert 0 < gap < 2 * parity["max_output_difference"]
    assert (
        opened.tokenizer("return left + right")["input_ids"]
        == loaded.tokenizer("return left + right")["input_ids"]
    )
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert "output.weight" not in stored  # the tie is kept


def test_what_is_not_mapped_is_refused_by_name(tmp_path: Path):
    with pytest.raises(CannotExport, match="GPT2LMHeadModel is not mapped to GGUF here; llama, qwen2 are"):
        export(tiny_model("gpt2"), tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())
