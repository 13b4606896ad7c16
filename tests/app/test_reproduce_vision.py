"""The scripts of pictures and pairs, run in a process of their own, print our numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from app.reproduce import probe_script
from core.images.digits import digit
from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Prompt, Result, silent
from tests.tiny import tiny_folder

pytestmark = pytest.mark.rotating

PAIR = Prompt("one two three four", "the capital of France is Paris")


def both(
    id_: str, family: str, prompt: Prompt, folder: Path, **settings: object
) -> tuple[Result, list[list[str]]]:
    """Our result, and the words of each line that the script prints."""
    method, model = get("probe", id_), str(tiny_folder(family, folder))
    parsed = method.parse(dict(settings))
    ours = method.run(open_model(ModelRef(model)), prompt, silent, parsed)
    script = probe_script(method, model, model, prompt, parsed)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return ours, [line.split() for line in done.stdout.splitlines()]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.fromarray(digit(1348)[0]).save(path)
    return str(path)


@pytest.mark.slow
def test_pair_similarity(tmp_path: Path) -> None:
    ours, lines = both("pair_similarity", "bert", PAIR, tmp_path / "model")
    assert float(lines[0][1]) == pytest.approx(ours.metrics[0].value, abs=2e-6)
    rows = [*ours.frames["first"].itertuples(), *ours.frames["second"].itertuples()]
    for row, (position, contribution, effect, *_) in zip(rows, lines[1:], strict=True):
        assert row.position == int(position)
        assert row.contribution == pytest.approx(float(contribution), abs=2e-6)
        if not row.special:
            assert row.effect_of_leaving_out == pytest.approx(float(effect), abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"target": "3", "distractor": "5", "size": 2, "hide_with": "black"}]
)
def test_patch_occlusion(tmp_path: Path, picture: str, settings: dict[str, object]) -> None:
    ours, lines = both("patch_occlusion", "vit", Prompt(image=picture), tmp_path / "model", **settings)
    for row, (y, x, weight) in zip(ours.frames["patches"].itertuples(), lines, strict=True):
        assert (row.row, row.column) == (int(y), int(x))
        assert row.weight == pytest.approx(float(weight), abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "bert", "llama"])
def test_attention_rollout(family: str, tmp_path: Path, picture: str) -> None:
    prompt = Prompt(image=picture) if family == "vit" else Prompt(PAIR.text)
    ours, lines = both("attention_rollout", family, prompt, tmp_path / "model", residual_share=0.4)
    rows = ours.frame.sort_values("position").itertuples()
    for row, (position, weight, *_) in zip(rows, lines, strict=True):
        assert row.position == int(position)
        assert row.weight == pytest.approx(float(weight), abs=2e-6)
