"""Bytes promised before a variant is made, against the bytes of the model that the recipe's steps leave."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.models.open import open_model
from core.models.pace import Pace
from core.models.sizes import model_card
from core.prediction import predicted_bytes, predicted_work
from core.recipe import Recipe
from core.registry import get
from core.saving.store import predicted_bytes as exact_bytes
from core.types import Documents, ModelRef, silent
from tests.tiny import tiny_folder

TEXT = Documents("words", "calibration", ("one two three four five six seven eight nine ten " * 40,))


def model_after(loaded, recipe: Recipe) -> float:
    for step in recipe.steps:
        get("compress", step.method).run(loaded, TEXT, silent, step.parsed())
    return float(loaded.nbytes)


@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("olmoe", "prune_experts", {"criterion": "aimer", "share": 0.5, "compare_tokens": 0}),
        ("olmoe", "prune_experts", {"criterion": "random", "count": 1, "compare_tokens": 0}),
        ("mixtral", "merge_experts", {"scheme": "hc_smoe", "share": 0.5}),
        ("qwen3_moe", "reduce_top_k", {"top_k": 1}),
        ("llama", "upcycle", {"experts": 3}),
        ("mixtral", "densify", {}),
    ],
)
def test_structural_steps_are_predicted(tmp_path, family, method, settings):
    loaded = open_model(ModelRef(str(tiny_folder(family, tmp_path))))
    card, recipe = model_card(loaded), Recipe.of(method, **settings)
    told = predicted_bytes(card, recipe)
    assert told is not None
    assert told == pytest.approx(
        model_after(loaded, recipe), rel=0.05
    )  # routers of tiny models are not small


def test_what_follows_a_structural_step_is_counted_on_what_it_left(tmp_path):
    card = model_card(open_model(ModelRef(str(tiny_folder("olmoe", tmp_path)))))
    prune = {"method": "prune_experts", "settings": {"share": 0.5}}
    both = Recipe.parse({"steps": [prune, {"method": "cast", "settings": {"dtype": "bfloat16"}}]})
    alone = Recipe.parse({"steps": [prune]})
    assert predicted_bytes(card, both) == pytest.approx(predicted_bytes(card, alone) / 2)


def test_a_step_that_will_be_refused_promises_nothing(tmp_path):
    card = model_card(open_model(ModelRef(str(tiny_folder("olmoe", tmp_path)))))
    assert predicted_bytes(card, Recipe.of("prune_experts", share=0.001)) is None


@pytest.mark.parametrize(
    ("family", "method", "settings"),
    [
        ("llama", "rtn", {"bits": 4, "group_size": "32", "scheme": "affine"}),
        ("llama", "rtn", {"bits": 8, "group_size": "channel", "embedding_bits": 16, "head_bits": 8}),
        ("qwen2", "rtn", {"bits": 3, "scheme": "symmetric"}),
        ("olmoe", "expert_bits", {"format": "int4", "share": 0.5}),
        ("olmoe", "expert_bits", {"format": "float8"}),
        ("llama", "cast", {}),
    ],
)
def test_stored_bits_are_those_of_the_file(tmp_path, family, method, settings):
    loaded = open_model(ModelRef(str(tiny_folder(family, tmp_path))))
    card, recipe = model_card(loaded), Recipe.of(method, **settings)
    told = predicted_bytes(card, recipe)
    for step in recipe.steps:
        frame = get("compress", step.method).run(loaded, TEXT, silent, step.parsed()).frames["main"]
    assert told == pytest.approx(float(frame["bytes_after"].sum()), rel=0.02)


def test_a_step_that_says_nothing_is_not_predicted(tmp_path):
    card = model_card(open_model(ModelRef(str(tiny_folder("olmoe", tmp_path)))))
    assert predicted_bytes(card, Recipe.of("novice_experts")) is None


def test_work_is_told_only_by_steps_that_tell_it(tmp_path):
    loaded = open_model(ModelRef(str(tiny_folder("olmoe", tmp_path))))
    card = replace(model_card(loaded), pace=Pace(0.5, 0.0, 1))
    silent_work = predicted_work(card, Recipe.of("prune_experts", share=0.5))
    assert (silent_work.seconds, silent_work.peak_bytes) == (None, None)
    assert silent_work.untold == ("prune_experts",)
    assert predicted_work(card, Recipe.of("cast")).seconds == 0.5
    assert predicted_work(card, Recipe.of("rtn")).seconds == 0.5
    told = predicted_work(card, Recipe.of("gptq", samples=16, sample_tokens=64))
    cost = get("compress", "gptq").cost(
        card.anatomy, 64, get("compress", "gptq").parse({"samples": 16, "sample_tokens": 64})
    )
    assert told.seconds == pytest.approx(0.5 * cost.forwards)
    assert told.peak_bytes == card.bytes + cost.extra_bytes
    steps = [{"method": "prune_experts", "settings": {"share": 0.5}}, {"method": "gptq"}]
    assert predicted_work(card, Recipe.parse({"steps": steps})).peak_bytes is None


def test_a_budget_is_what_the_file_will_weigh(tmp_path):
    card = model_card(open_model(ModelRef(str(tiny_folder("llama", tmp_path)))))
    assert predicted_bytes(card, Recipe.of("mixed_precision", budget="4bpw")) == card.parameters * 4 // 8
    assignment = "embedding:int8, 0.o:int4g32"
    told = Recipe.of("mixed_precision", budget="1.25MB", assignment=assignment)
    assert predicted_bytes(card, told) == 1_250_000, "the size of a plan is in its recipe"


@pytest.mark.parametrize(
    ("method", "settings"), [("rtn", {"bits": 4}), ("rtn", {"bits": 8}), ("reduce_top_k", {"top_k": 1})]
)
def test_the_promise_is_kept_where_the_base_is_in_half_precision_and_the_header_is_not_small(
    method, settings
):
    """A base of 7 MB whose file is float16: its variants keep that width, and 600 header lines are 3 % of them."""
    loaded = open_model(ModelRef("demo:moe"))
    card, recipe = model_card(loaded), Recipe.of(method, **settings)
    get("compress", method).run(loaded, None, silent, recipe.steps[0].parsed())
    assert predicted_bytes(card, recipe) == pytest.approx(exact_bytes(loaded), rel=0.01)
