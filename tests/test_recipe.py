"""A recipe is one JSON: in the page, on the command line, in a file."""

from __future__ import annotations

import json

import pytest

from core.errors import BadInput, BadSettings, UnknownMethod
from core.recipe import Recipe


def test_defaults_are_written_out_so_that_a_later_default_changes_nothing():
    recipe = Recipe.of("rtn", bits=4)
    settings = json.loads(recipe.canonical())["steps"][0]["settings"]
    assert settings["bits"] == 4
    assert set(settings) == set(recipe.steps[0].parsed().model_dump())


def test_canonical_json_round_trips_to_the_same_id():
    recipe = Recipe.of("rtn", bits=8, group_size="channel")
    again = Recipe.parse(json.loads(recipe.canonical()))
    assert again == recipe
    assert again.variant_id("base") == recipe.variant_id("base")


def test_id_depends_on_recipe_and_on_base():
    recipe = Recipe.of("rtn", bits=4)
    assert recipe.variant_id("a") != recipe.variant_id("b")
    assert recipe.variant_id("a") != Recipe.of("rtn", bits=3).variant_id("a")


def test_key_order_and_spaces_do_not_matter(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text('{ "steps": [ {"settings": {"group_size": "32", "bits": 4}, "method": "rtn"} ] }')
    assert Recipe.read(file).hash == Recipe.of("rtn", bits=4, group_size="32").hash


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ({"steps": []}, BadInput, "steps"),
        ({"steps": [{"method": "rtm"}]}, UnknownMethod, "there are:"),
        ({"steps": [{"method": "rtn", "settings": {"bits": 9}}]}, BadSettings, "bits"),
        ({"steps": [{"method": "rtn", "settings": {"bit": 4}}]}, BadSettings, "unknown setting 'bit'"),
        ({"steps": [{"method": "rtn"}], "schema_version": 99}, BadInput, "99"),
        ([], BadInput, "a recipe looks like"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong_and_what_is_allowed(value, error, words):
    with pytest.raises(error, match=words):
        Recipe.parse(value)


def test_a_file_that_is_not_json_is_named(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text("{")
    with pytest.raises(BadInput, match=r"recipe\.json is not JSON"):
        Recipe.read(file)
    with pytest.raises(BadInput, match="No such file"):
        Recipe.read(tmp_path / "none.json")


def test_a_label_says_the_first_setting_and_what_was_changed():
    assert Recipe.of("rtn").label() == "rtn bits=4"
    assert Recipe.of("rtn", scheme="symmetric").label() == "rtn bits=4 scheme=symmetric"
    assert Recipe.of("cast", dtype="float16").label() == "cast dtype=float16"


def test_a_recipe_that_reads_no_text_says_nothing_of_any():
    plain = Recipe.of("rtn", bits=4)
    told = Recipe.parse({**json.loads(plain.canonical()), "calibration": "domain:python"})
    assert "calibration" not in plain.canonical()
    assert told == plain
    assert told.variant_id("base") == plain.variant_id("base")


def test_other_calibration_text_makes_another_variant_with_another_name():
    default = Recipe.of("prune_experts")
    other = default.calibrated_on("domain:python")
    assert default.calibration == "pydoc"
    assert other.variant_id("base") != default.variant_id("base")
    assert other.label() == f"{default.label()} on domain:python"
    assert Recipe.parse(json.loads(other.canonical())) == other


def test_a_path_is_the_same_variant_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, whole = (Recipe.of("fine_tune", data=data) for data in ("rows.tsv", str(tmp_path / "rows.tsv")))
    assert here != whole
    assert here.variant_id("base") == whole.variant_id("base") == here.located.variant_id("base")
    assert here.variant_id("base") != Recipe.of("fine_tune", data="other.tsv").variant_id("base")
