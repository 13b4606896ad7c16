"""Shapes and templates become recipes: what stands before the training, and what is refused before anything is opened."""

from __future__ import annotations

import pytest

from core.errors import BadInput, BadSettings
from core.student_recipes import TEMPLATES, Shape, distilled, parsed_step, template_of


def told(shape: Shape, **training: object) -> list[tuple[str, dict[str, object]]]:
    return [(step.method, step.settings) for step in distilled(shape, 30, training).steps]


def test_a_shape_is_cut_then_rounded_then_trained() -> None:
    shape = Shape(layers=15, width=0.5, bits=3, steps=(parsed_step("prune_width:part=heads,share=0.25"),))
    steps = told(shape, max_tokens=5000)
    assert [method for method, _ in steps] == ["drop_layers", "prune_width", "prune_width", "gptq", "distil"]
    assert (steps[0][1]["count"], steps[0][1]["criterion"]) == (15, "even")
    assert (steps[1][1]["part"], steps[1][1]["share"], steps[2][1]["part"]) == ("ffn", 0.5, "heads")
    assert (steps[-1][1]["train"], steps[-1][1]["max_tokens"]) == ("scales_and_norms", 5000)


def test_what_moves_can_be_said_and_nothing_before_it_is_a_recovery() -> None:
    assert told(Shape(bits=2), train="lora")[-1][1]["train"] == "lora"
    assert [method for method, _ in told(Shape())] == ["distil"]
    assert told(Shape(layers=1))[0][1]["keep_ends"] is False


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.id)
@pytest.mark.parametrize("n_layers", [2, 30])
def test_every_template_is_a_recipe_that_ends_with_a_training(template, n_layers) -> None:
    recipe = template.recipe(n_layers, {"max_tokens": 4096})
    assert recipe.steps[-1].method in ("distil", "fine_tune")
    assert recipe.steps[-1].settings["max_tokens"] == 4096


def test_wrong_shapes_are_one_sentence() -> None:
    for shape, words in ((Shape(layers=30), "1 to 29"), (Shape(layers=15, model="demo:moe"), "own shape")):
        with pytest.raises(BadInput, match=words):
            distilled(shape, 30, {})
    with pytest.raises(BadInput, match="there are: half"):
        template_of("third")
    with pytest.raises(BadInput, match="METHOD:key=value"):
        parsed_step("prune_width:0.5")
    with pytest.raises(BadSettings, match="share"):
        parsed_step("prune_width:share=2")
