"""Room for a recipe is asked for before the work; memory that runs out on the way is told by the amount needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.compress._pipeline import compress
from core.errors import CannotCompress, OutOfMemory
from core.free_memory import free_memory
from core.models.loaded import LoadedModel
from core.quantize import grid
from core.recipe import Recipe
from core.saving import room
from core.saving.room import PROOF_BYTES, needs
from core.types import silent
from tests.compress.making import own_model
from tests.tiny import tiny_model

INT4 = Recipe.of("rtn", bits=4)


def assert_untouched(loaded: LoadedModel, before: dict[str, torch.Tensor], out: Path) -> None:
    assert not loaded.packed
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
    assert not out.exists()


def test_needs_are_the_file_the_codes_and_a_second_copy(tmp_path: Path) -> None:
    loaded = tiny_model("llama")
    found = needs(loaded, INT4)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    assert found.memory_bytes == parameters + loaded.nbytes + PROOF_BYTES
    assert found.file_bytes is not None
    # int4 with scales and zero points, an 8-bit embedding: 4.6 to 6 bits.
    assert 4.6 < 8 * found.file_bytes / parameters < 6
    assert needs(loaded, Recipe.of("cast")).file_bytes == pytest.approx(2 * parameters)


def test_a_disk_without_room_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = own_model("llama", tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=10**9, free=1000)
    )
    with pytest.raises(CannotCompress, match=r"has 0 MB free but this needs \d+ MB"):
        compress(loaded, INT4, None, tmp_path / "out/variant", silent)
    assert_untouched(loaded, before, tmp_path / "out")


def test_a_machine_without_room_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = own_model("llama", tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    monkeypatch.setattr(room, "free_memory", lambda: 100_000_000)
    with pytest.raises(
        OutOfMemory, match=r"not enough memory for rtn bits=4: it needs about 4\d\d MB .* 100 MB are free"
    ):
        compress(loaded, INT4, None, tmp_path / "out/variant", silent)
    assert_untouched(loaded, before, tmp_path / "out")


def test_memory_that_runs_out_on_the_way_is_told_by_the_amount_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)  # the allocator's own refusal

    monkeypatch.setattr(grid, "rounded", allocate)
    with pytest.raises(OutOfMemory, match=r"out of memory for rtn bits=4: it needs about \d+ MB"):
        compress(own_model("llama", tmp_path), INT4, None, tmp_path / "out/variant", silent)
    assert not (tmp_path / "out").exists()


def test_other_errors_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(grid, "rounded", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        compress(own_model("llama", tmp_path), INT4, None, tmp_path / "out/variant", silent)


def test_free_memory_is_what_a_limit_leaves(tmp_path: Path) -> None:
    machine = free_memory(cgroup=tmp_path / "none")
    assert machine > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    assert free_memory(cgroup=tmp_path) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(cgroup=tmp_path) == pytest.approx(machine, rel=0.5)
