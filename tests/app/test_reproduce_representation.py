"""The script shown for steering runs in a process of its own and gives our numbers."""

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

PROMPT = Prompt("The capital of France is")


def printed(method, folder, settings):
    script = probe_script(method, str(folder), str(folder), PROMPT, settings)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_the_steering_script_gives_our_numbers(tmp_path, mode):
    folder = tiny_folder("llama", tmp_path)
    method = get("probe", "steering")
    settings = method.parse({"mode": mode, "layer": 2, "max_new_tokens": 5, "strength": 0.8})
    ours = method.run(open_model(ModelRef(str(folder))), PROMPT, silent, settings).frame
    row = ours.iloc[2 if mode == "add" else 1]
    unsteered, steered, kl = printed(method, folder, settings)
    assert unsteered == f"unsteered {ours['continuation'].iloc[0]!r}"
    assert steered == f"steered {row['continuation']!r}"
    assert float(kl.split()[-1]) == pytest.approx(row["kl_nats"], abs=2e-4)
