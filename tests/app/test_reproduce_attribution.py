"""The script behind "Reproduce" of direct logit attribution gives our numbers, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app.reproduce import probe_script
from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.tiny import tiny_folder

pytestmark = pytest.mark.rotating


@pytest.mark.slow
@pytest.mark.parametrize("distractor", ["", " and"])
def test_the_script_gives_our_parts(tmp_path: Path, distractor: str) -> None:
    folder, prompt = tiny_folder("llama", tmp_path), Prompt("The capital of France is")
    method = get("probe", "direct_logit_attribution")
    settings = method.parse({"target": " the", "distractor": distractor})
    ours = method.run(open_model(ModelRef(str(folder))), prompt, silent, settings).frame
    script = probe_script(method, str(folder), str(folder), prompt, settings)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *parts, last = done.stdout.splitlines()
    theirs = {line.split(" ", 1)[1]: float(line.split(" ", 1)[0]) for line in parts}
    expected = dict(zip(ours["component"], ours["contribution"], strict=True))
    assert theirs == pytest.approx(expected, abs=1e-5)
    assert "the model's logit is" in last
