"""A sweep is whole recipes: every combination once, each with the id it would have alone."""

from __future__ import annotations

import math

import pytest

from core.catalog.store import Catalog
from core.entries import opened
from core.errors import BadInput
from core.models.sizes import model_card
from core.recipe import Recipe
from core.sweep import MOST, Measuring, combinations, planned, run_sweep, values_of
from core.types import silent
from tests.tiny import tiny_folder


def test_combinations_are_whole_recipes_the_last_setting_fastest():
    found = combinations(
        Recipe.of("rtn", scheme="symmetric"), {"bits": ["3", "8"], "group_size": ["32", "64"]}
    )
    told = [(r.steps[0].settings["bits"], r.steps[0].settings["group_size"]) for r in found]
    assert told == [(3, "32"), (3, "64"), (8, "32"), (8, "64")]
    assert found[1] == Recipe.of("rtn", bits=3, group_size="64", scheme="symmetric")


def test_only_the_swept_step_changes_and_repeats_are_one():
    recipe = Recipe.parse({"steps": [{"method": "cast"}, {"method": "rtn"}]})
    found = combinations(recipe, {"bits": ["3", "3", "4"]}, step=1)
    assert [r.steps[0] for r in found] == [recipe.steps[0]] * 2
    assert found[1] == recipe


def test_the_text_that_calibrates_stays():
    recipe = Recipe.of("gptq").calibrated_on("domains")
    assert {r.calibration for r in combinations(recipe, {"bits": ["3", "4"]})} == {"domains"}


@pytest.mark.parametrize(
    ("over", "step", "said"),
    [
        ({"bit": ["3"]}, 0, "rtn has no setting 'bit'; there are: bits"),
        ({"bits": ["9"]}, 0, "bits = "),
        ({"bits": []}, 0, "needs values for bits"),
        ({}, 0, "needs values for at least one setting"),
        ({"bits": ["3"]}, 1, "step 2 is not in the recipe"),
        ({"bits": ["3"] * (MOST + 1)}, 0, f"more than the {MOST}"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_a_sentence(over, step, said):
    with pytest.raises(BadInput, match=said):
        combinations(Recipe.of("rtn"), over, step=step)


def test_values_are_typed_with_commas():
    assert values_of(" 2, 3,4 ,") == ["2", "3", "4"]


@pytest.mark.slow
def test_a_sweep_makes_measures_and_finds_again_and_one_failure_costs_only_its_own(tmp_path):
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    model = str(tiny_folder("smollm", tmp_path / "model"))
    measuring = Measuring(
        evaluate={"max_documents": "4", "max_document_tokens": "32"},
        profile={"tier": "rapid", "prompt_tokens": "8", "new_tokens": "2"},
    )
    # 3-bit embeddings on another grid than the layers are refused.
    recipes = combinations(Recipe.of("rtn", bits=4), {"embedding_bits": ["8", "3"]})
    rows = run_sweep(catalog, model, recipes, measuring, progress=silent)
    made, lost = rows[rows["failed"].isna()], rows[rows["failed"].notna()]
    assert len(made) == 2, "the base and one variant"
    assert made["kl"].notna().all()
    assert made["decode_tokens_per_s"].notna().all()
    assert "embedding_bits=3" in lost["failed"].iloc[0]
    plan = planned(catalog, model_card(opened(catalog, model)), recipes)
    assert plan["made"].tolist() == [True, False]
    real = made.set_index("variant").loc[plan["variant"].iloc[0], "bytes"]
    assert math.isclose(plan["predicted_bytes"].iloc[0], real, rel_tol=0.15)  # a tiny file is mostly header
    runs = len(catalog.runs(plan["variant"].iloc[0]))
    run_sweep(catalog, model, recipes[:1], measuring, progress=silent)
    assert len(catalog.runs(plan["variant"].iloc[0])) == runs, "nothing is measured twice"
