"""An export as a whole: the folder, its card and checksums, the package in the catalog, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from core import libraries
from core.catalog.queries import exports
from core.catalog.store import Catalog
from core.delivery import export_package, export_to, package_of
from core.errors import CannotExport, MissingLibrary
from core.loop import make_variant
from core.recipe import Recipe
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("delivery")


@pytest.fixture(scope="module")
def catalog(home: Path) -> Catalog:
    return Catalog(f"sqlite:///{home / 'catalog.sqlite'}")


@pytest.fixture(scope="module")
def variant(home: Path, catalog: Catalog) -> str:
    made = make_variant(
        catalog, str(tiny_folder("smollm", home / "base")), Recipe.of("rtn", bits=8, embedding_bits=8)
    )
    return f"variant:{made.variant.id}"


def test_a_stored_export_is_the_variant_with_its_papers(home: Path, catalog: Catalog, variant: str):
    made = export_to(catalog, variant, "safetensors", home / "out")
    assert {m.name: m.value for m in made.run.measurements}["max_output_difference"] == 0
    source = catalog.variant_folder(made.variant.id)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (home / "out" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((home / "out" / "recipe.json").read_text()) == json.loads(made.variant.recipe or "")
    assert json.loads((home / "out" / "proof.json").read_text())["conditions"]["passed"] is True
    card = (home / "out" / "README.md").read_text()
    assert f"{(home / 'out' / 'model.safetensors').stat().st_size / 1e6:,.1f} MB of weights" in card
    assert "passed; largest output difference 0.0" in card
    for line in (home / "out" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((home / "out" / name).read_bytes()).hexdigest() == digest
    listed = {line.split("  ")[1] for line in (home / "out" / "SHA256SUMS").read_text().splitlines()}
    assert listed == {p.name for p in (home / "out").iterdir()} - {"SHA256SUMS"}


def test_a_package_is_one_file_of_the_store_with_dense_weights(catalog: Catalog, variant: str):
    made = export_package(catalog, variant, "safetensors", settings={"weights": "bfloat16"})
    file = catalog.artifacts.root / package_of(made.run)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        names = {name.partition("/")[2] for name in archive.namelist()}
        config = json.loads(archive.read(f"{file.stem}/config.json"))
    assert {"model.safetensors", "README.md", "SHA256SUMS", "recipe.json", "measurements.csv"} <= names
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert [run.id for run in exports(catalog, made.variant.id) if "package" in run.conditions] == [
        made.run.id
    ]


def test_a_refused_export_leaves_nothing(home: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch):
    gpt2 = str(tiny_folder("gpt2", home / "gpt2"))
    with pytest.raises(CannotExport, match="not mapped"):
        export_to(catalog, gpt2, "gguf", home / "refused")
    with pytest.raises(CannotExport, match="exists already"):
        export_to(catalog, gpt2, "safetensors", home / "gpt2")
    monkeypatch.setattr(libraries, "version", _nothing_installed)
    with pytest.raises(
        MissingLibrary, match=r"pip install onnx==1\.23\.2 onnxscript==0\.7\.2 onnxruntime==1\.32\.0"
    ):
        export_to(catalog, gpt2, "onnx", home / "refused")
    assert not (home / "refused").exists()
    assert not list(home.glob(".refused*"))


def _nothing_installed(name: str) -> str:
    raise PackageNotFoundError(name)
