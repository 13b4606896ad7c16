"""A recipe that is made in one folder and run in another means the same files."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.located import located_source
from core.recipe import Recipe


def test_names_stay_and_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "pydoc",
        "stdlib",
        "domains",
        "digits",
        "domain:code",
        "builtin:intents",
        "hub:org/set:train",
    ):
        assert located_source(name) == name
    assert located_source("rows.csv") == str(tmp_path / "rows.csv")


def test_a_recipe_names_rows_and_models_by_their_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Recipe.of("distil", data="rows.csv", teacher="./teacher").located
    assert made.steps[0].settings["data"] == str(tmp_path / "rows.csv")
    assert made.steps[0].settings["teacher"] == str(tmp_path / "teacher")
    assert made.located == made
    plain = Recipe.of("distil", data="pydoc", teacher="demo:smollm2")
    assert plain.located == plain
    read = Recipe.of("gptq").calibrated_on("text.txt").located
    assert read.calibration == str(tmp_path / "text.txt")
