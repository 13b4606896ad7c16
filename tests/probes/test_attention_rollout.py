"""Rollout: closed forms, loops over paths, and where it must point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes._relevance import encode_any
from core.probes.attention_rollout import AttentionRolloutSettings, attention_rollout, rollout_step
from core.types import ModelRef, Prompt, Result, silent
from tests.colour_vit import colour_vit, painted
from tests.references.slow_relevance import patterns_of, rollout_by_hand
from tests.tiny import FAMILIES, SPECIAL_VISION, tiny_folder, tiny_model

TEXT = Prompt("one two three one two three")


def prompt_for(family: str) -> Prompt:
    return Prompt(image="digits:7") if family in ("vit", *SPECIAL_VISION) else TEXT


def run(loaded: LoadedModel, prompt: Prompt, **settings: float) -> Result:
    return attention_rollout(loaded, prompt, silent, AttentionRolloutSettings.model_validate(settings))


def weights(result: Result) -> np.ndarray:
    return result.frame.sort_values("position")["weight"].to_numpy()


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL_VISION])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_equals_the_sum_over_paths(family: str, share: float) -> None:
    loaded = tiny_model(family)
    result = run(loaded, prompt_for(family), residual_share=share, position=2)
    patterns = patterns_of(loaded, encode_any(loaded, prompt_for(family)).inputs)
    assert weights(result) == pytest.approx(rollout_by_hand(patterns, share)[2], abs=1e-6)
    assert result.provenance.exactness_gap == pytest.approx(0, abs=2e-6)
    by_layer = result.frames["layers"].groupby("layer")["weight"].sum()
    assert by_layer.to_numpy() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("family", "position"), [("vit", 0), ("llama", 6), ("gpt2", 6)])
def test_reads_from_the_position_the_model_answers_from(family: str, position: int) -> None:
    loaded = tiny_model(family)
    assert weights(run(loaded, prompt_for(family))).tolist() == pytest.approx(
        weights(run(loaded, prompt_for(family), position=position)).tolist(), abs=0
    )


def test_a_mean_pooled_encoder_reads_from_all_tokens() -> None:
    loaded = tiny_model("bert")
    n = len(weights(run(loaded, TEXT)))
    each = np.mean([weights(run(loaded, TEXT, position=position)) for position in range(n)], axis=0)
    assert weights(run(loaded, TEXT)) == pytest.approx(each, abs=1e-6)


class TestClosedForms:
    n, heads, layers = 7, 3, 5

    def roll(self, pattern: torch.Tensor, layers: int, share: float = 0.5) -> torch.Tensor:
        rolled = torch.eye(self.n, dtype=torch.float64)
        for _ in range(layers):
            rolled = rollout_step(rolled, pattern.expand(self.heads, -1, -1), share)
        return rolled

    def test_attention_to_oneself_moves_nothing(self) -> None:
        eye = torch.eye(self.n, dtype=torch.float64)
        assert torch.equal(self.roll(eye, self.layers), eye)

    def test_uniform_attention(self) -> None:
        uniform = torch.full((self.n, self.n), 1 / self.n, dtype=torch.float64)
        expected = 2.0**-self.layers * torch.eye(self.n, dtype=torch.float64)
        expected += (1 - 2.0**-self.layers) / self.n
        torch.testing.assert_close(self.roll(uniform, self.layers), expected, atol=1e-15, rtol=0)

    def test_one_layer_is_the_mean_with_the_identity(self) -> None:
        pattern = torch.rand(self.n, self.n, dtype=torch.float64).softmax(-1)
        expected = 0.5 * (pattern + torch.eye(self.n))
        torch.testing.assert_close(self.roll(pattern, 1), expected, atol=1e-15, rtol=0)

    def test_layers_are_multiplied_in_the_order_of_the_model(self) -> None:
        torch.manual_seed(0)
        first, second = (torch.rand(2, self.n, self.n, dtype=torch.float64) * 4).softmax(-1)
        step = rollout_step(torch.eye(self.n, dtype=torch.float64), first[None], 0.0)
        torch.testing.assert_close(rollout_step(step, second[None], 0.0), second @ first)
        assert not torch.allclose(second @ first, first @ second, atol=1e-3)


def test_uniform_attention_on_a_whole_model(tmp_path: Path) -> None:
    """Zero queries make every pattern uniform: the closed form, through hooks and all."""
    loaded = open_model(ModelRef(str(tiny_folder("vit", tmp_path))))
    with torch.no_grad():
        for block in loaded.anatomy.blocks:
            query = loaded.model.get_submodule(block.q)
            query.weight.zero_()
            query.bias.zero_()
    n, layers = 17, loaded.anatomy.n_layers
    expected = np.full(n, (1 - 2.0**-layers) / n)
    expected[0] += 2.0**-layers
    assert weights(run(loaded, Prompt(image="digits:7"))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("patch", [0, 6, 15])
def test_the_patch_that_is_the_class_peaks(patch: int, tmp_path: Path) -> None:
    image = painted(tmp_path / "picture.png", {patch: (255, 0, 0), (patch + 5) % 16: (0, 0, 255)})
    frame = run(colour_vit(patch), Prompt(image=image)).frames["patches"]
    assert int(frame["weight"].argmax()) == patch
    # Half of what arrives comes through attention, half of that through the head that looks.
    others = 0.5 * 0.5 / 17
    assert frame["weight"][patch] == pytest.approx(0.25 + others, abs=1e-5)
    assert frame["weight"].drop(patch).to_numpy() == pytest.approx(others, abs=1e-5)


def test_a_blank_image_without_places_is_flat(tmp_path: Path) -> None:
    image = painted(tmp_path / "blank.png", {})
    frame = run(colour_vit(3, looks=False), Prompt(image=image)).frames["patches"]
    assert np.ptp(frame["weight"]) < 1e-7


def test_a_position_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BadInput, match="from 0 to 16"):
        run(tiny_model("vit"), Prompt(image="digits:7"), position=17)
