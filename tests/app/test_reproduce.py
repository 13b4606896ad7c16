from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys

import pytest

from app.reproduce import SCRIPTS, probe_command, probe_script, recipe_command, recipe_script, with_constants
from core.recipe import Recipe
from core.registry import get, methods
from core.types import Prompt


def test_constants_are_replaced_as_literals():
    script = with_constants('MODEL = "a"\nTOP_K = 5\nx = MODEL\n', {"MODEL": 'b"; import os #', "TOP_K": 7})
    assert ast.literal_eval(script.splitlines()[0].removeprefix("MODEL = ")) == 'b"; import os #'
    assert script.splitlines()[1:] == ["TOP_K = 7", "x = MODEL"]


def test_the_command_quotes_the_text_and_names_changed_settings_only():
    method = get("probe", "logit_lens")
    line = probe_command(method, "demo:smollm2", Prompt("it's; rm -rf"), method.parse({"top_k": 7}))
    assert shlex.split(line)[2:] == [
        *("logit_lens", "--model", "demo:smollm2", "--text", "it's; rm -rf"),
        *("--set", "top_k=7"),
    ]


@pytest.mark.parametrize("id_", methods("probe"))
def test_every_probe_has_a_script_that_parses(id_):
    method = get("probe", id_)
    script = probe_script(method, "demo:smollm2", "/models/x", Prompt('a "quoted"\ntext'), method.parse({}))
    ast.parse(script)
    assert "/models/x" in script or "demo:smollm2" in script


@pytest.mark.slow
def test_the_logit_lens_script_gives_our_numbers(tmp_path):
    """The script runs plain transformers in a process of its own; every entropy and KL must be ours."""
    from core.models.open import open_model
    from core.types import ModelRef, Prompt, silent
    from tests.tiny import tiny_folder

    folder, text = tiny_folder("llama", tmp_path), "a small text about nothing"
    method = get("probe", "logit_lens")
    ours = method.run(open_model(ModelRef(str(folder))), Prompt(text), silent, method.parse({})).frame
    script = with_constants((SCRIPTS / "logit_lens.py").read_text(), {"MODEL": str(folder), "TEXT": text})
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    theirs = {
        tuple(map(int, line.split()[:2])): tuple(map(float, line.split()[2:4]))
        for line in printed.splitlines()
    }
    assert len(theirs) == len(ours)
    for row in ours.itertuples():
        assert theirs[row.layer, row.position] == pytest.approx(
            (row.entropy_nats, row.kl_to_final_nats), abs=2e-4
        )


RECIPES = [
    Recipe.of("rtn", bits=8, group_size="channel", scheme="symmetric"),
    Recipe.of("rtn", bits=4, group_size="32", scheme="affine"),
    Recipe.of("cast", dtype="bfloat16"),
]


@pytest.mark.parametrize("id_", methods("compress"))
def test_every_compression_has_a_script_that_parses(id_):
    ast.parse(recipe_script(Recipe.of(id_), "/models/x"))


def test_the_command_writes_the_recipe_it_runs():
    lines = recipe_command(RECIPES[0], "a b").splitlines()
    assert Recipe.parse(json.loads(lines[1])) == RECIPES[0]
    assert shlex.split(lines[3])[:4] == ["slimscope", "run", "recipe.json", "--model"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=Recipe.label)
def test_the_compression_scripts_give_our_errors(recipe, tmp_path):
    """Plain torch in a process of its own; the relative error of every linear weight must be ours."""
    from core.models.open import open_model
    from core.types import ModelRef, silent
    from tests.tiny import tiny_folder

    folder = tiny_folder("llama", tmp_path)
    step = recipe.steps[0]
    method = get("compress", step.method)
    ours = method.run(open_model(ModelRef(str(folder))), None, silent, method.parse(step.settings)).frame
    ours = ours[ours["component"].isin(["attention", "mlp"])]
    script = recipe_script(recipe, str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    theirs = {
        name.removesuffix(".weight"): float(error) for error, name in map(str.split, done.stdout.splitlines())
    }
    assert len(ours) > 0
    for module, error in zip(ours["module"], ours["relative_error"], strict=True):
        assert theirs[module.removeprefix("model.")] == pytest.approx(error, abs=2e-6)
