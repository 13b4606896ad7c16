"""Planted faults: each must miss its reference by far more than rounding, or be refused; else the tests prove nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import SlimscopeError
from core.models import patch_grid as grids
from core.probes import _image, attention_relevance, attention_rollout, pair_similarity, patch_occlusion
from core.registry import get
from core.types import Prompt, silent
from tests.colour_vit import colour_vit, painted
from tests.references.slow_relevance import occlusion_by_hand, patterns_of, rollout_by_hand
from tests.tiny import tiny_model

DIGIT = Prompt(image="digits:7")
PAIR = Prompt("one two three four", "the capital of France is Paris")


def weights(id_: str, model: Any, prompt: Prompt, **settings: object) -> np.ndarray:
    method = get("probe", id_)
    frame = method.run(model, prompt, silent, method.parse(dict(settings))).frame
    by = next(name for name in ("position", "patch") if name in frame)
    return frame.sort_values(by)["weight"].to_numpy()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rolled, pattern, share: (1 - share) * rolled @ pattern.mean(0) + share * rolled,  # other order
        lambda rolled, pattern, share: (1 - share) * pattern[0] @ rolled + share * rolled,  # one head
        lambda rolled, pattern, share: (
            (1 - share) * pattern.mean(0).T @ rolled + share * rolled
        ),  # transposed
        lambda rolled, pattern, share: pattern.mean(0) @ rolled,  # no residual
    ],
)
def test_a_wrong_rollout(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("vit")
    expected = rollout_by_hand(patterns_of(loaded, _image.encode_image(loaded, DIGIT).inputs), 0.5)[0]
    monkeypatch.setattr(attention_rollout, "rollout_step", wrong)
    assert np.abs(weights("attention_rollout", loaded, DIGIT) - expected).max() > 1e-3


def test_relevance_that_keeps_what_lowers_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = painted(tmp_path / "picture.png", {5: (255, 0, 0), 2: (0, 0, 255)})
    prompt = Prompt(image=image)
    right = weights("attention_relevance", colour_vit(5), prompt, target="blue")
    assert right.max() < 1e-6, "the red patch speaks against blue, and the blue one is not looked at"
    monkeypatch.setattr(
        attention_relevance,
        "relevance_step",
        lambda r, pattern, gradient: r + (gradient * pattern).abs().mean(0) @ r,
    )
    assert weights("attention_relevance", colour_vit(5), prompt, target="blue").max() > 0.01


def test_registers_left_out_of_the_grid_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _image, "patch_grid", lambda config: replace(grids.patch_grid(config), special=("[CLS]",))
    )
    for id_ in ("attention_rollout", "attention_relevance"):
        with pytest.raises(SlimscopeError, match="makes 9 positions of the input, 5 were expected"):
            weights(id_, tiny_model("dinov2_registers"), DIGIT)


def test_patches_hidden_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("vit")
    pixels = _image.encode_image(loaded, DIGIT).inputs["pixel_values"]
    expected = occlusion_by_hand(loaded, pixels, pixels.mean().expand_as(pixels[0]), target=4, patch=8)
    plain = patch_occlusion._Hider.scores

    def transposed(hider: Any, masks: np.ndarray, message: str) -> np.ndarray:
        return plain(hider, masks.reshape(-1, 4, 4).transpose(0, 2, 1).reshape(len(masks), -1), message)

    monkeypatch.setattr(patch_occlusion._Hider, "scores", transposed)
    assert np.abs(weights("patch_occlusion", loaded, DIGIT, target="4") - expected).max() > 1e-2


def test_contributions_of_another_pooling_miss_the_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    method, loaded = get("probe", "pair_similarity"), tiny_model("bert")
    settings = method.parse({"leave_out": False})
    assert method.run(loaded, PAIR, silent, settings).provenance.exactness_gap < 1e-6

    def words_only(loaded: Any, encoded: Any) -> torch.Tensor:
        weight = torch.tensor([float(n > 0) for n in encoded.n_bytes])
        return weight / weight.sum()

    monkeypatch.setattr(pair_similarity, "_pooling", words_only)
    assert method.run(loaded, PAIR, silent, settings).provenance.exactness_gap > 1e-4
