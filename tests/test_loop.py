"""The loop on a catalog: a number belongs to the files that were entered."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.catalog.store import Catalog
from core.errors import BadInput, CannotOpen
from core.loop import compare, evaluate_variant, make_variant, profile_variant, register
from core.models.checkpoint import fingerprint
from core.recipe import Recipe, Step
from core.types import ModelRef
from tests.tiny import tiny_folder


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")


def test_a_base_is_entered_once_and_found_by_its_files(catalog: Catalog, tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path / "model")
    entered = register(catalog, str(folder))
    assert entered.fingerprint == fingerprint(folder)
    assert entered.source == ModelRef(str(folder)).located
    catalog.hide_variant(entered.id)
    assert register(catalog, str(folder)) == entered
    assert catalog.variants() == [entered]  # visible again


def test_a_base_whose_files_changed_is_not_measured(catalog: Catalog, tmp_path: Path) -> None:
    folder = tiny_folder("llama", tmp_path / "model")
    entered = register(catalog, str(folder))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for measure in (profile_variant, evaluate_variant):
        with pytest.raises(CannotOpen, match="its files changed since"):
            measure(catalog, entered.id)
    assert catalog.runs(entered.id) == []


def test_a_vision_model_is_measured_on_pictures(catalog: Catalog) -> None:
    base = register(catalog, "demo:vit")
    assert base.family == "vision"
    run = evaluate_variant(catalog, base.id, settings={"max_images": "16"})
    found = {m.name: m.value for m in run.measurements}
    assert found["kl"] == 0
    assert found["accuracy"] > 0.7
    assert run.conditions["images"] == "digits 1347 to 1362"
    with pytest.raises(BadInput, match="give digits, or a folder"):
        evaluate_variant(catalog, base.id, documents="a_text.txt")


@pytest.mark.slow
def test_a_vision_variant_is_proven_and_compared(catalog: Catalog) -> None:
    made = make_variant(catalog, "demo:vit", Recipe(steps=(Step(method="rtn", settings={"bits": 4}),)))
    assert made.variant.proven
    run = evaluate_variant(catalog, made.variant.id)
    found = {m.name: m.value for m in run.measurements}
    assert 0 < found["kl"] < 0.05
    assert found["top1_agreement"] > 0.95
    assert "accuracy" in compare(catalog)
