"""Gradient-weighted relevance: zero gradients, finite differences, and where it must point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput, CannotMeasure
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes import attention_relevance as module
from core.probes._image import encode_image
from core.probes.attention_relevance import (
    AttentionRelevanceSettings,
    attention_relevance,
    relevance_step,
)
from core.types import ModelRef, Prompt, Result, silent
from tests.colour_vit import colour_vit, painted
from tests.references.slow_relevance import relevance_by_differences
from tests.tiny import DECODERS, FAMILIES, SPECIAL_VISION, tiny_folder, tiny_model

TEXT = Prompt("one two three one two three")


def run(loaded: LoadedModel, prompt: Prompt, **settings: object) -> Result:
    return attention_relevance(loaded, prompt, silent, AttentionRelevanceSettings.model_validate(settings))


def weights(result: Result) -> np.ndarray:
    return result.frame.sort_values("position")["weight"].to_numpy()


def test_a_zero_gradient_leaves_the_identity() -> None:
    pattern = torch.rand(3, 5, 5).softmax(-1)
    assert torch.equal(relevance_step(torch.eye(5), pattern, torch.zeros(3, 5, 5)), torch.eye(5))


def test_only_what_raises_the_answer_counts() -> None:
    pattern = torch.full((1, 2, 2), 0.5)
    gradient = torch.tensor([[[1.0, -3.0], [0.0, 2.0]]])
    expected = torch.tensor([[1.5, 0.0], [0.0, 2.0]])
    assert torch.equal(relevance_step(torch.eye(2), pattern, gradient), expected)


def test_an_answer_that_attention_cannot_move_has_no_relevance(tmp_path: Path) -> None:
    """Attention that writes nothing has a zero gradient in every layer: R stays I."""
    loaded = open_model(ModelRef(str(tiny_folder("vit", tmp_path))))
    with torch.no_grad():
        for block in loaded.anatomy.blocks:
            loaded.model.get_submodule(block.o).weight.zero_()
    result = run(loaded, Prompt(image="digits:7"))
    assert not weights(result).any()
    assert "every weight is 0" in " ".join(result.notes)


@pytest.mark.parametrize("target", ["red", "blue"])
def test_equals_finite_differences(target: str, tmp_path: Path) -> None:
    colours = {5: (255, 0, 40), 9: (0, 90, 255), 2: (10, 200, 0)}
    image = painted(tmp_path / "picture.png", colours)
    loaded = colour_vit(5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # no head dead, no weight round: every entry of the pattern matters
        for parameter in loaded.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        loaded.model.vit.layers[0].attention.q_proj.bias.mul_(0.05)
    result = run(loaded, Prompt(image=image), target=target)
    inputs = encode_image(loaded, Prompt(image=image)).inputs
    by_hand = relevance_by_differences(loaded, inputs, ("red", "green", "blue").index(target))
    expected = by_hand[0] - np.eye(17)[0]
    assert weights(result) == pytest.approx(expected, rel=1e-4, abs=1e-6 * expected.max())
    assert expected.max() > 0


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL_VISION])
def test_runs_on_every_family_and_leaves_the_model_as_it_was(family: str) -> None:
    loaded = tiny_model(family)
    prompt = Prompt(image="digits:7") if family in ("vit", *SPECIAL_VISION) else TEXT
    kernel = loaded.model.config._attn_implementation
    result = run(loaded, prompt)
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-4)
    assert (weights(result) >= 0).all()
    assert weights(result).sum() > 0
    assert loaded.model.config._attn_implementation == kernel
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in loaded.model.parameters()
    )


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_gives_later_tokens_nothing(family: str) -> None:
    assert not weights(run(tiny_model(family), TEXT, position=3))[4:].any()


def test_the_class_that_is_asked_for_changes_the_map() -> None:
    loaded = tiny_model("vit")
    first, second = (weights(run(loaded, Prompt(image="digits:7"), target=str(n))) for n in (1, 2))
    assert not np.allclose(first, second, rtol=0.1)


def test_a_second_text_is_explained_by_the_cosine() -> None:
    loaded = tiny_model("bert")
    result = run(loaded, Prompt(TEXT.text, "three two one"))
    assert "cosine" in result.notes[0]
    assert len(result.frame) == len(run(loaded, TEXT).frame), "the second text is not read with the first"


@pytest.mark.parametrize("patch", [0, 6, 15])
def test_the_patch_that_is_the_class_peaks(patch: int, tmp_path: Path) -> None:
    image = painted(tmp_path / "picture.png", {patch: (255, 0, 0), (patch + 5) % 16: (0, 0, 255)})
    frame = run(colour_vit(patch), Prompt(image=image)).frames["patches"]
    assert int(frame["weight"].argmax()) == patch
    assert frame["weight"].drop(patch).max() < 1e-6 * frame["weight"][patch]


def test_a_blank_image_without_places_is_flat(tmp_path: Path) -> None:
    image = painted(tmp_path / "blank.png", {}, ground=200)
    frame = run(colour_vit(3, looks=False), Prompt(image=image)).frames["patches"]
    assert np.ptp(frame["weight"]) < 1e-7


def test_a_pattern_out_of_the_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: a kernel that detaches its pattern must not give a plausible map."""
    plain = module.attention_by

    def cut(loaded, stand_in):
        def detached(layer, kernel, block, query, key, value, mask, arguments):
            def kernel_cut(*args, **options):
                output, pattern = kernel(*args, **options)
                return output, pattern.detach()

            return stand_in(layer, kernel_cut, block, query, key, value, mask, arguments)

        return plain(loaded, detached)

    monkeypatch.setattr(module, "attention_by", cut)
    with pytest.raises(RuntimeError, match="grad"):
        run(tiny_model("vit"), Prompt(image="digits:7"))


@pytest.mark.parametrize(
    ("family", "prompt", "settings", "words"),
    [
        ("vit", Prompt(image="digits:7"), {"target": "cat"}, "no class of this model"),
        ("vit", Prompt("a text"), {}, "reads no text"),
        ("bert", TEXT, {"target": "one"}, "no head that names"),
        ("bert", Prompt("one two", "  "), {}, "second text is empty"),
        ("llama", Prompt("one", image="digits:7"), {}, "takes no image"),
        ("llama", TEXT, {"position": 99}, "from 0 to 6"),
    ],
)
def test_bad_input_is_refused(family: str, prompt: Prompt, settings: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        run(tiny_model(family), prompt, **settings)


def test_a_quantized_kernel_without_backward_is_refused(tmp_path: Path) -> None:
    loaded = open_model(ModelRef(str(tiny_folder("vit", tmp_path))))
    layer = loaded.model.get_submodule(loaded.anatomy.blocks[0].q)
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CannotMeasure, match="packed as int8"):
        run(loaded, Prompt(image="digits:7"))
