"""The attributions on a CUDA device give the CPU's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.tiny import tiny_folder, tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPT = Prompt("When Mary and John went to the store")
CASES = [
    ("direct_logit_attribution", "main", "contribution", {}),
    ("neuron_tokens", "main", "contribution", {}),
    ("occlusion", "tokens", "score", {"quality_orders": 2}),
    ("shapley_values", "tokens", "score", {"orders": 8, "occlude_with": "mean_embedding"}),
    ("input_x_gradient", "tokens", "score", {}),
    (
        "integrated_gradients",
        "tokens",
        "score",
        {"quadrature": "gauss_legendre", "start_layer": 1, "steps": 8},
    ),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(("id_", "frame", "column", "settings"), CASES, ids=[case[0] for case in CASES])
def test_equal_to_the_cpu(
    id_: str, frame: str, column: str, settings: dict[str, object], family: str, tmp_path: Path
) -> None:
    method = get("probe", id_)
    parsed = method.parse({"target": " the", **settings})
    there = open_model(ModelRef(str(tiny_folder(family, tmp_path)), device="cuda"))
    found = method.run(there, PROMPT, silent, parsed)
    expected = method.run(tiny_model(family), PROMPT, silent, parsed)
    assert found.provenance.device.startswith("cuda")
    # Ranks may swap between equals: compare the sizes in order.
    ours = found.frames[frame][column].sort_values().to_numpy()
    assert ours == pytest.approx(expected.frames[frame][column].sort_values().to_numpy(), rel=1e-3, abs=1e-4)
