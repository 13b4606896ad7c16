"""Pair similarity: the terms sum to the cosine, each equals a loop, and leaving out equals encoding without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput
from core.models.embed import embed
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes.pair_similarity import PairSimilaritySettings, pair_similarity
from core.registry import get
from core.types import ModelRef, Prompt, Result, silent
from tests.references.slow_relevance import similarity_terms_by_hand
from tests.tiny import tiny_folder, tiny_model

PAIR = Prompt("one two three four", "the capital of France is Paris")


def run(loaded: LoadedModel, prompt: Prompt = PAIR, **settings: object) -> Result:
    return pair_similarity(loaded, prompt, silent, PairSimilaritySettings.model_validate(settings))


def value(result: Result, name: str) -> float:
    return next(metric.value for metric in result.metrics if metric.name == name)


def vectors(loaded: LoadedModel, text: str | None) -> np.ndarray:
    with torch.inference_mode():
        output = loaded.model(**loaded.tokenizer(text, return_tensors="pt"))  # type: ignore[misc]
    return np.asarray(output.last_hidden_state[0].double().numpy())


def test_terms_sum_to_the_cosine_and_equal_loops() -> None:
    loaded = tiny_model("bert")
    result = run(loaded)
    terms = similarity_terms_by_hand(vectors(loaded, PAIR.text), vectors(loaded, PAIR.second))
    assert result.frames["pairs"]["contribution"].to_numpy() == pytest.approx(np.ravel(terms), abs=1e-7)
    both = embed(loaded, [PAIR.text, str(PAIR.second)])
    assert value(result, "cosine") == pytest.approx(float(both[0] @ both[1]), abs=1e-6)
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-6)
    for name, axis in (("first", 1), ("second", 0)):
        assert result.frames[name]["contribution"].to_numpy() == pytest.approx(np.sum(terms, axis), abs=1e-7)
    parts = value(result, "from_words") + value(result, "from_special_tokens")
    assert parts == pytest.approx(value(result, "cosine"), abs=1e-9)


def test_a_text_with_itself_has_cosine_one_and_a_symmetric_map() -> None:
    result = run(tiny_model("bert"), Prompt(PAIR.text, PAIR.text))
    assert value(result, "cosine") == pytest.approx(1, abs=1e-6)
    square = result.frames["pairs"].pivot(index="first", columns="second", values="contribution").to_numpy()
    assert square == pytest.approx(square.T, abs=1e-9)
    assert result.frames["first"]["effect_of_leaving_out"].dropna().min() > 0, (
        "nothing is more alike than itself"
    )


def test_leaving_out_equals_one_forward_with_the_token_masked() -> None:
    loaded = tiny_model("bert")
    frame = run(loaded).frames["first"]
    inputs = loaded.tokenizer(PAIR.text, return_tensors="pt")  # type: ignore[misc]
    other = vectors(loaded, PAIR.second).mean(0)
    cosine = value(run(loaded), "cosine")
    words = frame[~frame["special"]]
    assert len(words) == len(frame) - 2
    for position, effect in zip(words["position"], words["effect_of_leaving_out"], strict=True):
        mask = inputs["attention_mask"].clone()
        mask[0, position] = 0
        with torch.inference_mode():
            hidden = loaded.model(**{**inputs, "attention_mask": mask}).last_hidden_state[0].double().numpy()
        mean = np.delete(hidden, position, axis=0).mean(0)
        without = float(mean @ other / np.linalg.norm(mean) / np.linalg.norm(other))
        assert effect == pytest.approx(cosine - without, abs=1e-6)


def test_swapping_the_texts_swaps_the_frames() -> None:
    loaded = tiny_model("bert")
    there, back = run(loaded), run(loaded, Prompt(str(PAIR.second), PAIR.text))
    for column in ("contribution", "effect_of_leaving_out"):
        expected = there.frames["second"][column].to_numpy()
        assert back.frames["first"][column].to_numpy() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_a_class_token_encoder_says_that_only_leaving_out_speaks(tmp_path: Path) -> None:
    folder = tiny_folder("bert", tmp_path)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    result = run(open_model(ModelRef(str(folder))))
    first = result.frames["first"]
    assert first["contribution"].iloc[0] == pytest.approx(value(result, "cosine"), abs=1e-9)
    assert not first["contribution"].iloc[1:].any()
    assert first["effect_of_leaving_out"].abs().max() > 0
    assert any("class token's alone" in note for note in result.notes)


def test_long_texts_keep_their_tables_and_lose_the_map() -> None:
    text = "one two three four five six seven " * 16
    result = run(tiny_model("bert"), Prompt(text, text), leave_out=False)
    assert "pairs" not in result.frames
    assert any("left out" in note for note in result.notes)


def test_special_tokens_may_be_hidden() -> None:
    result = run(tiny_model("bert"), special_tokens=False)
    assert not result.frame["special"].any()
    shown = result.frames["pairs"]["contribution"].sum()
    assert shown == pytest.approx(value(result, "from_words"), abs=1e-9)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (Prompt("one text"), "needs two texts"),
        (Prompt("one text", "  "), "needs two texts"),
        (Prompt("  ", "a text"), "empty"),
        (Prompt("one", "two", image="digits:1"), "takes no image"),
    ],
)
def test_bad_input_is_refused(prompt: Prompt, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        run(tiny_model("bert"), prompt)


def test_a_decoder_or_a_vision_model_does_not_offer_it() -> None:
    method = get("probe", "pair_similarity")
    assert tiny_model("llama").missing_needs(method.needs) == ("encoder",)
    assert tiny_model("vit").missing_needs(method.needs) == ("encoder", "text")


@pytest.mark.slow
def test_the_worked_example_finds_the_bank() -> None:
    method = get("probe", "pair_similarity")
    minilm = open_model(ModelRef.parse("demo:minilm"))
    result = method.run(minilm, method.examples[0].prompt, silent, method.parse({}))
    words = result.frame[~result.frame["special"]]
    assert words["token"].iloc[:2].tolist() == ["bank", "bank"]
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-6)
