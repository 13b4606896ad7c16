"""The script shown for activation patching runs in a process of its own and gives our numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from app.reproduce import probe_script
from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.tiny import tiny_folder

pytestmark = pytest.mark.rotating

PROMPT = Prompt("a b c d e f")


@pytest.mark.parametrize(
    ("node", "direction"), [("residual", "denoising"), ("mlp_out", "noising"), ("attention_out", "denoising")]
)
def test_the_script_gives_our_numbers(tmp_path, node, direction):
    folder = tiny_folder("llama", tmp_path)
    method = get("probe", "activation_patching")
    settings = method.parse(
        {"corrupted": "a b c d e X", "node": node, "direction": direction, "target": "a", "distractor": "z"}
    )
    ours = method.run(open_model(ModelRef(str(folder))), PROMPT, silent, settings).frame
    script = probe_script(method, str(folder), str(folder), PROMPT, settings)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, *lines = done.stdout.splitlines()
    theirs = [float(line.split()[-1]) for line in lines]
    assert theirs == pytest.approx(ours["recovered"].tolist(), abs=1e-3)
