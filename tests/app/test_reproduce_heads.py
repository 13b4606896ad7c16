"""The "Reproduce" scripts of the head probes give our numbers, in plain transformers and a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.reproduce import probe_script
from core.registry import get
from core.types import Prompt

pytestmark = pytest.mark.rotating

TEXT = "one two three one two three four"


def printed(id_: str, folder: Path, settings: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    method = get("probe", id_)
    script = probe_script(method, "x", str(folder), Prompt(TEXT), method.parse(settings))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(line[0], line[1]): [float(value) for value in line[2:]] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("id_", "settings", "columns"),
    [
        (
            "head_scores",
            {"length": 12, "sequences": 3, "seed": 4},
            ["induction", "previous_token", "duplicate_token"],
        ),
        ("ablation_scan", {"ablation": "mean"}, ["loss_increase", "kl_nats"]),
        ("ablation_scan", {"ablation": "zero"}, ["loss_increase", "kl_nats"]),
    ],
)
def test_the_script_gives_our_numbers(
    id_: str, settings: dict[str, Any], columns: list[str], tmp_path: Path
) -> None:
    from core.models.open import open_model
    from core.types import ModelRef, silent
    from tests.tiny import tiny_folder

    folder = tiny_folder("llama", tmp_path)
    method = get("probe", id_)
    ours = method.run(open_model(ModelRef(str(folder))), Prompt(TEXT), silent, method.parse(settings)).frames[
        "main"
    ]
    theirs = printed(id_, folder, settings)
    assert len(theirs) == len(ours)
    component = "component" if "component" in ours else "head"
    for _, row in ours.iterrows():
        expected = theirs[str(row["layer"]), str(row[component])]
        assert row[columns].tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.slow
def test_the_head_reading_script_gives_our_numbers(tmp_path: Path) -> None:
    from core.models.open import open_model
    from core.types import ModelRef, silent
    from tests.tiny import tiny_folder

    folder, settings = tiny_folder("llama", tmp_path), {"layer": 1, "head": 2, "query": -2}
    method = get("probe", "head_reading")
    loaded = open_model(ModelRef(str(folder)))
    ours = method.run(loaded, Prompt(TEXT), silent, method.parse(settings)).frames["sources"]
    script = probe_script(method, "x", str(folder), Prompt(TEXT), method.parse(settings))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    theirs = {
        int(line.split()[0]): [float(v) for v in line.split()[1:5]] for line in done.stdout.splitlines()
    }
    assert len(theirs) == len(ours)
    for _, row in ours.iterrows():
        expected = row[["weight", "promoted_logit", "own_logit", "own_rank"]].tolist()
        assert theirs[row["source"]] == pytest.approx(expected, abs=2e-4)
