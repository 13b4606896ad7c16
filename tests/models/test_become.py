"""An opened model that becomes another one: what is refreshed, what stays, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.compress.rtn import RtnSettings
from core.compress.rtn import run as round_to_nearest
from core.errors import AnatomyMismatch, CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.types import ModelRef, silent
from tests.tiny import tiny_folder, tiny_model


def opened(family: str, folder: Path) -> LoadedModel:
    return open_model(ModelRef(str(tiny_folder(family, folder / family))))


def test_anatomy_and_checks_are_of_the_new_model_and_the_rest_stays(tmp_path: Path) -> None:
    loaded, other = opened("llama", tmp_path), tiny_model("mixtral")
    kept = (loaded.tokenizer, loaded.folder, loaded.fingerprint, loaded.lock, loaded.ref, loaded.notes)
    loaded.become(other.model)
    assert loaded.model is other.model
    assert loaded.anatomy == other.anatomy
    assert loaded.offers == {"decoder", "text", "heads", "moe"}
    assert "weighted experts sum to their output" in loaded.checks
    assert kept == (
        loaded.tokenizer, loaded.folder, loaded.fingerprint, loaded.lock, loaded.ref, loaded.notes,
    )  # fmt: skip


def test_an_edited_model_is_taken_up_anew_ready_to_use(tmp_path: Path) -> None:
    loaded = opened("olmoe", tmp_path)
    loaded.model.config.num_experts_per_tok = 3
    for block in loaded.anatomy.blocks:
        loaded.model.get_submodule(block.router).top_k = 3
    loaded.model.train()
    loaded.become(loaded.model)
    assert loaded.anatomy.experts_per_token == 3
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_model_whose_anatomy_does_not_hold_leaves_the_old_one_in_place(tmp_path: Path) -> None:
    loaded, broken = opened("llama", tmp_path / "a"), opened("olmoe", tmp_path / "b").model
    broken.model.layers[1].mlp.register_forward_hook(lambda module, given, output: 1.5 * output)
    before = (loaded.model, loaded.anatomy, loaded.checks)
    with pytest.raises(AnatomyMismatch, match=r"layers\.1\.mlp"):
        loaded.become(broken)
    assert before == (loaded.model, loaded.anatomy, loaded.checks)


def test_a_quantized_model_is_not_replaced(tmp_path: Path) -> None:
    loaded = opened("llama", tmp_path)
    with torch.inference_mode():
        round_to_nearest(loaded, None, silent, RtnSettings())
    with pytest.raises(CannotCompress, match="quantize last"):
        loaded.become(tiny_model("mixtral").model)
