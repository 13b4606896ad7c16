"""Patch occlusion: one forward per patch by hand, a model whose answer is one patch, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from core.errors import BadInput, Cancelled, CannotMeasure
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.models.patch_grid import patch_grid
from core.probes import patch_occlusion as module
from core.probes._image import encode_image
from core.probes.patch_occlusion import PatchOcclusionSettings, patch_occlusion, windows
from core.types import ModelRef, Prompt, Result, silent
from tests.colour_vit import colour_vit, painted
from tests.references.slow_relevance import occlusion_by_hand
from tests.tiny import SPECIAL_VISION, tiny_folder, tiny_model

DIGIT = Prompt(image="digits:7")


def run(loaded: LoadedModel, prompt: Prompt = DIGIT, **settings: object) -> Result:
    return patch_occlusion(loaded, prompt, silent, PatchOcclusionSettings.model_validate(settings))


def weights(result: Result) -> np.ndarray:
    return result.frames["patches"]["weight"].to_numpy()


@pytest.mark.parametrize("colour", ["mean", "black", "white"])
def test_equals_one_forward_per_patch(colour: str) -> None:
    loaded = tiny_model("vit")
    pixels = encode_image(loaded, DIGIT).inputs["pixel_values"]
    level = {"mean": pixels.mean(), "black": torch.tensor(-1.0), "white": torch.tensor(1.0)}[colour]
    by_hand = occlusion_by_hand(loaded, pixels, level.expand_as(pixels[0]), target=4, patch=8)
    result = run(loaded, hide_with=colour, target="4")
    assert weights(result) == pytest.approx(by_hand, abs=2e-5)
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-5)
    ranked = result.frame["weight"].to_numpy()
    assert (np.diff(ranked) <= 0).all()


def test_a_difference_is_the_difference_of_both() -> None:
    loaded = tiny_model("vit")
    both = weights(run(loaded, target="4", distractor="2"))
    assert both == pytest.approx(
        weights(run(loaded, target="4")) - weights(run(loaded, target="2")), abs=1e-5
    )


def test_a_square_of_several_patches_is_shared_by_those_it_covers() -> None:
    loaded = tiny_model("vit")
    masks = windows(patch_grid(loaded.model.config), 2)
    assert masks.shape == (9, 16)
    assert masks.sum(1).tolist() == [4] * 9
    assert masks[:, 5].sum() == 4
    assert masks[:, 0].sum() == 1
    whole = run(loaded, size=4, target="4")
    cover = run(loaded, size=1, target="4", curve_points=1).frames["curves"]
    lost = cover.query("hidden == 0")["score"].iloc[0] - cover.query("hidden == 16")["score"].iloc[0]
    assert weights(whole) == pytest.approx(lost, abs=1e-5), "one square over everything"


@pytest.mark.parametrize("patch", [0, 6, 15])
def test_the_patch_that_is_the_class_peaks(patch: int, tmp_path: Path) -> None:
    image = painted(tmp_path / "picture.png", {patch: (255, 0, 0), (patch + 5) % 16: (0, 0, 255)})
    result = run(colour_vit(patch), Prompt(image=image), hide_with="black")
    found = result.frames["patches"]["weight"]
    assert int(found.argmax()) == patch
    assert found[patch] > 0.1
    assert np.abs(found.drop(patch)).max() < 1e-6
    curves = result.frames["curves"]
    first = curves[curves["order"] == "heaviest first"]["score"].to_numpy()
    assert first[1] == pytest.approx(first[-1], abs=1e-6), "with that patch hidden nothing is left"


def test_a_blank_image_is_flat(tmp_path: Path) -> None:
    image = painted(tmp_path / "blank.png", {}, ground=90)
    assert not weights(run(tiny_model("vit"), Prompt(image=image))).round(5).any()
    assert not weights(run(colour_vit(3), Prompt(image=image))).any()


def test_boxes_tile_the_picture_that_is_shown() -> None:
    import io

    from PIL import Image

    result = run(tiny_model("vit"))
    width, height = Image.open(io.BytesIO(result.images["patches"])).size
    boxes = result.frames["patches"]
    assert (boxes["width"] * boxes["height"]).sum() == width * height
    assert (boxes["x"] + boxes["width"]).max() == width
    assert (boxes["y"] + boxes["height"]).max() == height
    assert not boxes.duplicated(["x", "y"]).any()


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("vit")
    expected = weights(run(loaded))
    plain = module.class_logits

    def small(loaded: LoadedModel, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 3:
            raise RuntimeError("CUDA out of memory")
        return plain(loaded, pixels)

    monkeypatch.setattr(module, "class_logits", small)
    assert weights(run(loaded)) == pytest.approx(expected, abs=1e-5)


def test_stops_when_asked() -> None:
    def stop(done: float, total: float, message: str) -> None:
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        patch_occlusion(tiny_model("vit"), DIGIT, stop, PatchOcclusionSettings())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 5}, "4 × 4 patches"),
        ({"target": "cat"}, "no class of this model"),
        ({"target": "3", "distractor": "3"}, "difference is 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        run(tiny_model("vit"), **settings)


def test_a_model_without_classifier_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder("vit", tmp_path)
    transformers.ViTModel.from_pretrained(folder, add_pooling_layer=True).save_pretrained(folder)
    loaded = open_model(ModelRef(str(folder)))
    with pytest.raises(CannotMeasure, match="names no classes"):
        run(loaded)


@pytest.mark.parametrize("family", SPECIAL_VISION)
def test_special_tokens_and_oblong_pictures_do_not_shift_the_map(family: str) -> None:
    loaded = tiny_model(family)
    pixels = encode_image(loaded, DIGIT).inputs["pixel_values"]
    patch = patch_grid(loaded.model.config).patch_height
    by_hand = occlusion_by_hand(loaded, pixels, pixels.mean().expand_as(pixels[0]), target=4, patch=patch)
    assert weights(run(loaded, target="4")) == pytest.approx(by_hand, abs=2e-5)
