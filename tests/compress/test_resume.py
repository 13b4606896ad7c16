"""Making a variant again after it was stopped half-way: it goes on, ends at the same files, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.calibrate import walk
from core.catalog.store import Catalog
from core.errors import Cancelled
from core.loop import make_variant
from core.models.loaded import LoadedModel
from core.recipe import Recipe
from tests.tiny import tiny_folder

RECIPE = Recipe.of("gptq", bits=4, samples=8, sample_tokens=64)


def test_a_stopped_variant_is_taken_up_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = str(tiny_folder("smollm", tmp_path / "base"))
    stopped, whole = (
        Catalog(f"sqlite:///{tmp_path / name / 'catalog.sqlite'}") for name in ("stopped", "whole")
    )

    def cancel(done: float, total: float, message: str) -> None:
        if message == "block 3 of 3":
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        make_variant(stopped, base, RECIPE, progress=cancel)
    scratch = stopped.folder / "scratch"
    assert len(list(scratch.rglob("block_*.safetensors"))) == 2
    restored: list[int] = []
    read_block = walk.read_block

    def counted(file: Path, loaded: LoadedModel) -> object:
        restored.append(int(file.stem.rpartition("_")[2]))
        return read_block(file, loaded)

    monkeypatch.setattr(walk, "read_block", counted)
    again = make_variant(stopped, base, RECIPE)
    assert restored == [0, 1]
    assert list(scratch.iterdir()) == []
    expected = make_variant(whole, base, RECIPE)
    assert restored == [0, 1]
    assert again.variant.artifact == expected.variant.artifact
    assert again.variant.proven
