"""Pooling by hand on a tiny encoder: padding never counts, and the checkpoint's own pooling is used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CannotMeasure, CannotOpen
from core.models.embed import embed
from core.models.open import open_model
from core.types import ModelRef
from tests.tiny import tiny_folder, tiny_model

TEXTS = ["one two three", "The capital of France is Paris, and the capital of Italy is Rome."]


def by_hand(text: str, pooling: str) -> torch.Tensor:
    loaded = tiny_model("bert")
    assert loaded.tokenizer is not None
    with torch.inference_mode():
        tokens = loaded.model(**loaded.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    vector = tokens.mean(0) if pooling == "mean" else tokens[0]
    return vector / vector.norm()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_padded_batch_gives_what_each_text_gives_alone(pooling: Any) -> None:
    loaded = dataclasses.replace(tiny_model("bert"), pooling=pooling)
    for vector, text in zip(embed(loaded, TEXTS), TEXTS, strict=True):
        torch.testing.assert_close(vector, by_hand(text, pooling), atol=1e-5, rtol=0)


def test_more_texts_than_a_batch_keep_their_order() -> None:
    texts = [f"{word} {number}" for number in range(40) for word in ("one", "two")]
    vectors = embed(tiny_model("bert"), texts)
    torch.testing.assert_close(vectors[71], embed(tiny_model("bert"), [texts[71]])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_pooling_is_read_from_the_checkpoint(settings: dict[str, Any], pooling: str, tmp_path: Path) -> None:
    folder = tiny_folder("bert", tmp_path)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert open_model(ModelRef(str(folder))).pooling == pooling


def test_another_pooling_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder("bert", tmp_path)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(CannotOpen, match="pooling other than mean or cls"):
        open_model(ModelRef(str(folder)))


def test_a_decoder_gives_no_sentence_vectors() -> None:
    with pytest.raises(CannotMeasure, match="need an encoder"):
        embed(tiny_model("llama"), TEXTS)
