"""Image classification: the identity, loops over pictures, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from core.errors import BadInput, Cancelled, CannotMeasure
from core.evaluate.image_classification import ImageClassificationSettings, run
from core.images.digits import digit
from core.images.labelled import load_images
from core.images.pixels import to_pixels
from core.journal import Journal
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.types import Metric, ModelRef, Result, silent
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def base() -> LoadedModel:
    return open_model(ModelRef.parse("demo:vit"))


@pytest.fixture
def shaken() -> LoadedModel:
    loaded = open_model(ModelRef.parse("demo:vit"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.4 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return loaded


def _settings(**changed: Any) -> ImageClassificationSettings:
    return ImageClassificationSettings.model_validate(
        {"bootstrap_draws": 500, "fp32_path": "exact"} | changed
    )


def _metrics(result: Result) -> dict[str, Metric]:
    return {metric.name: metric for metric in result.metrics}


def test_the_base_itself_agrees_exactly(base: LoadedModel) -> None:
    found = _metrics(run(base, base, load_images("digits", limit=64), Journal(), silent, _settings()))
    for name, value in (("kl", 0.0), ("top1_agreement", 1.0), ("flips", 0.0), ("delta_accuracy", 0.0)):
        assert (found[name].value, found[name].low, found[name].high) == (value, value, value)
    assert found["accuracy"].value == found["accuracy_base"].value


def test_the_stated_accuracy_is_that_of_the_held_out_digits(base: LoadedModel) -> None:
    from core.models.demo import demos

    found = _metrics(run(base, base, load_images("digits", limit=1000), Journal(), silent, _settings()))
    right = round(found["accuracy"].value * 450)
    assert found["accuracy"].n == 450
    assert f"{right} of 450" in demos()["vit"].description
    assert f"{right / 450:.1%}".replace("%", " %") in demos()["vit"].description


def test_equals_a_loop_over_pictures(base: LoadedModel, shaken: LoadedModel) -> None:
    images = load_images("digits", limit=40)
    found = _metrics(run(base, shaken, images, Journal(), silent, _settings()))
    kl = agree = right = was = flips = 0.0
    for picture in images.read(0, 40):
        with torch.inference_mode():
            p, q = (
                torch.softmax(
                    m.model(pixel_values=to_pixels(m, [picture]).values_NCHW).logits[0].double(), -1
                )
                for m in (base, shaken)
            )
        kl += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        before, after = str(int(p.argmax())) == picture.label, str(int(q.argmax())) == picture.label
        agree += int(p.argmax()) == int(q.argmax())
        was, right, flips = was + before, right + after, flips + (before != after)
    assert found["kl"].value == pytest.approx(kl / 40, rel=1e-4)
    assert found["top1_agreement"].value == agree / 40
    assert (found["accuracy_base"].value, found["accuracy"].value) == (was / 40, right / 40)
    assert found["flips"].value == flips / 40
    assert flips, "a variant that changes nothing would prove nothing"
    kl_interval = found["kl"]
    assert kl_interval.low is not None
    assert kl_interval.low < kl_interval.value < float(kl_interval.high or 0)
    assert "40 pictures" in kl_interval.interval


def test_the_table_leads_with_what_moved_most(base: LoadedModel, shaken: LoadedModel) -> None:
    result = run(base, shaken, load_images("digits", limit=64), Journal(), silent, _settings())
    table, classes = result.frames["images"], result.frames["classes"]
    assert table["kl"].is_monotonic_decreasing
    lost = table[(table["answer_base"] == table["label"]) & (table["answer"] != table["label"])]
    assert (lost["flip"] == "lost").all()
    assert classes["pictures"].sum() == 64


def test_a_stopped_run_goes_on_from_its_journal(
    base: LoadedModel, shaken: LoadedModel, tmp_path: Path
) -> None:
    images = load_images("digits", limit=96)

    def stop(done: float, total: float, message: str) -> None:
        if done >= 64:
            raise Cancelled("stop")

    path = tmp_path / "pictures.jsonl"
    with pytest.raises(Cancelled):
        run(base, shaken, images, Journal(path), stop, _settings())
    expected = run(base, shaken, images, Journal(), silent, _settings())
    # Another answer for what is still to be done only: finished batches come from the journal.
    with torch.no_grad():
        shaken.model.classifier.bias[3] = 1000
    mixed = run(base, shaken, images, Journal(path), silent, _settings())
    answers = mixed.frames["images"].set_index("image")["answer"]
    known = expected.frames["images"].set_index("image")["answer"]
    assert (answers[list(images.sources[:64])] == known[list(images.sources[:64])]).all()
    assert (answers[list(images.sources[64:])] == "3").all()


def test_a_folder_of_class_folders(base: LoadedModel, tmp_path: Path) -> None:
    for row in range(20):
        grey, label = digit(row)
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(grey).save(tmp_path / str(label) / f"{row}.png")
    images = load_images(str(tmp_path), limit=10)
    assert sorted(images.labels) == [str(n) for n in range(10)], "classes take turns"
    found = _metrics(run(base, base, images, Journal(), silent, _settings()))
    pictures = images.read(0, 10)
    with torch.inference_mode():
        answers = base.model(pixel_values=to_pixels(base, pictures).values_NCHW).logits.argmax(-1).tolist()
    right = sum(answer == int(label) for answer, label in zip(answers, images.labels, strict=True))
    assert found["accuracy"].value == right / 10
    assert right > 5
    assert "10 pictures" in found["accuracy"].interval
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "cat" / "one.png")
    with pytest.raises(BadInput, match="'cat' is no class"):
        run(base, base, load_images(str(tmp_path), limit=50), Journal(), silent, _settings())


def test_other_classes_and_numbers_that_are_none_are_refused(base: LoadedModel, tmp_path: Path) -> None:
    images = load_images("digits", limit=16)
    other = open_model(ModelRef(str(tiny_folder("vit", tmp_path))))
    with pytest.raises(BadInput, match="do not name the same classes"):
        run(base, other, images, Journal(), silent, _settings())
    broken = open_model(ModelRef.parse("demo:vit"))
    with torch.no_grad():
        broken.model.classifier.bias[0] = torch.nan
    with pytest.raises(
        CannotMeasure, match="digits:1347 to digits:1362: demo:vit gives class logits that are not finite"
    ):
        run(base, broken, images, Journal(), silent, _settings())


@pytest.mark.parametrize("source", ["", "nowhere", "pydoc"])
def test_unknown_pictures_are_refused(source: str) -> None:
    with pytest.raises(BadInput, match="give digits, or a folder"):
        load_images(source, limit=10)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "notes.txt").write_text("no picture")
    with pytest.raises(BadInput, match="no subfolder with image files"):
        load_images(str(tmp_path), limit=10)
