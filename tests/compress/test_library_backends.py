"""Other libraries' quantizers under our proof: exact reload by their own loader, the same weights in our opener."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.compress._pipeline import compress
from core.errors import CannotCompress
from core.models.open import open_model
from core.recipe import Recipe
from core.types import ModelRef, silent
from tests.compress.making import apply, own_model


@pytest.mark.parametrize(
    ("family", "method", "format_", "loader"),
    [
        (
            "smollm",
            "bitsandbytes_weights",
            "nf4",
            "AutoModelForCausalLM.from_pretrained(folder) with bitsandbytes",
        ),
        ("smollm", "quanto_weights", "int4", "QuantizedModelForCausalLM.from_pretrained(folder) with quanto"),
    ],
)
def test_a_librarys_files_reload_exactly_and_open_as_the_weights_in_memory(
    family: str, method: str, format_: str, loader: str, tmp_path: Path
):
    loaded = own_model(family, tmp_path)
    made = compress(loaded, Recipe.of(method, format=format_), None, tmp_path / "out", silent)
    assert made.proof.passed
    assert (made.proof.max_logit_difference, made.proof.differing_parameters) == (0.0, 0)
    assert made.proof.ties_kept
    assert made.proof.loader.startswith(loader)
    assert made.saved.bytes < 0.3 * 4 * 508_800 + 4 * 65_536
    opened = open_model(ModelRef(str(tmp_path / "out")))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(opened.model.get_parameter(name), parameter), name


def test_torchao_rounds_to_its_grid_and_predicts_its_bytes(tmp_path: Path):
    from core.saving.store import predicted_bytes

    loaded = own_model("bert", tmp_path)
    result = apply(loaded, "torchao_weights")
    quantized = result.frame[result.frame["format"] == "torchao int8"]
    assert len(quantized) == 19  # six products in each of three layers, and the pooler
    assert (quantized["relative_error"] < 0.012).all()
    assert (quantized["bytes_after"] < 0.3 * quantized["bytes_before"]).all()
    assert predicted_bytes(loaded) == pytest.approx(result.frame["bytes_after"].sum(), rel=0.03)


def test_what_a_library_would_do_badly_is_refused_with_the_reason(tmp_path: Path):
    with pytest.raises(CannotCompress, match="one byte each"):
        apply(own_model("bert", tmp_path / "a"), "torchao_weights", format="int4")
    with pytest.raises(CannotCompress, match="silently leave"):
        apply(own_model("mixtral", tmp_path / "b"), "bitsandbytes_weights")
    with pytest.raises(CannotCompress, match="Conv1D"):
        apply(own_model("gpt2", tmp_path / "c"), "quanto_weights")
