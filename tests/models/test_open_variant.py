"""A compressed variant opens as the dense model that was proved: tied, fused and expert weights included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.compress._pipeline import compress
from core.models.open import open_model
from core.recipe import Recipe
from core.types import ModelRef, silent
from tests.tiny import tiny_folder

pytestmark = pytest.mark.rotating


@pytest.mark.slow
@pytest.mark.parametrize("family", ["smollm", "gpt2", "olmoe"])
def test_a_quantized_variant_opens_bit_equal(family: str, tmp_path: Path) -> None:
    made = open_model(ModelRef(str(tiny_folder(family, tmp_path / "base"))))
    compress(made, Recipe.of("rtn"), None, tmp_path / "variant", silent)
    opened = open_model(ModelRef(str(tmp_path / "variant")))
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(opened.model(ids).logits, made.model(ids).logits)
    assert opened.anatomy.tied == made.anatomy.tied
    assert opened.fingerprint != made.fingerprint
