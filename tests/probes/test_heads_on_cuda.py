"""The head probes on a GPU give the CPU's numbers; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.tiny import tiny_folder, tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize(
    ("id_", "settings"),
    [
        ("attention_pattern", {"layer": 1}),
        ("head_scores", {"length": 12, "sequences": 3, "ablation": "mean"}),
        ("head_reading", {"layer": 2, "head": 1}),
        ("ablation_scan", {"ablation": "resample"}),
        ("ablation_scan", {"ablation": "zero"}),
    ],
)
def test_the_gpu_gives_the_cpus_numbers(
    family: str, id_: str, settings: dict[str, object], tmp_path: Path
) -> None:
    method = get("probe", id_)
    prompt = Prompt("John gave Mary a drink, and John gave Mary a transformer")
    on_gpu = open_model(ModelRef(str(tiny_folder(family, tmp_path)), device="cuda"))
    found = method.run(on_gpu, prompt, silent, method.parse(dict(settings)))
    expected = method.run(tiny_model(family), prompt, silent, method.parse(dict(settings)))
    assert found.provenance.exactness_gap < 1e-3
    for name, frame in expected.frames.items():
        if name in ("ranked", "pairs", "sources", "promoted", "composition"):
            continue  # ranked: equal scores may change places
        numbers = frame.select_dtypes("number").columns
        assert np.allclose(found.frames[name][numbers], frame[numbers], atol=2e-3, equal_nan=True), name
