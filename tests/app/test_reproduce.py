from __future__ import annotations

import ast
import shlex
import subprocess
import sys

import pytest

from app.reproduce import SCRIPTS, probe_command, probe_script, with_constants
from core.registry import get, methods


def test_constants_are_replaced_as_literals():
    script = with_constants('MODEL = "a"\nTOP_K = 5\nx = MODEL\n', {"MODEL": 'b"; import os #', "TOP_K": 7})
    assert ast.literal_eval(script.splitlines()[0].removeprefix("MODEL = ")) == 'b"; import os #'
    assert script.splitlines()[1:] == ["TOP_K = 7", "x = MODEL"]


def test_the_command_quotes_the_text_and_names_changed_settings_only():
    method = get("probe", "logit_lens")
    line = probe_command(method, "demo:smollm2", "it's; rm -rf", method.parse({"top_k": 7}))
    assert shlex.split(line)[2:] == [
        *("logit_lens", "--model", "demo:smollm2", "--text", "it's; rm -rf"),
        *("--set", "top_k=7"),
    ]


@pytest.mark.parametrize("id_", methods("probe"))
def test_every_probe_has_a_script_that_parses(id_):
    method = get("probe", id_)
    script = probe_script(method, "demo:smollm2", "/models/x", 'a "quoted"\ntext', method.parse({}))
    ast.parse(script)
    assert "/models/x" in script or "demo:smollm2" in script


@pytest.mark.slow
def test_the_logit_lens_script_gives_our_numbers(tmp_path):
    """The script runs plain transformers in a process of its own; every entropy and KL must be ours."""
    from core.models.open import open_model
    from core.types import ModelRef, Prompt
    from tests.tiny import tiny_folder

    folder, text = tiny_folder("llama", tmp_path), "a small text about nothing"
    method = get("probe", "logit_lens")
    ours = method.run(open_model(ModelRef(str(folder))), Prompt(text), method.parse({})).frame
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
