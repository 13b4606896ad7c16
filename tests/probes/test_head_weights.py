"""Folded head weights: norms that must not be dropped, weights that are not plain numbers, half precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import CannotMeasure
from core.models.open import open_model
from core.probes._head_weights import (
    HeadWeights,
    chance_composition,
    composition,
    dense_weight,
    every_copying,
    product_norm,
)
from core.registry import get
from core.types import ModelRef, Prompt, silent
from tests.references.slow_heads import ov_copying_by_hand
from tests.tiny import tiny_folder, tiny_model

PROMPT = Prompt("John gave Mary a drink, and John gave Mary a transformer")
HEAD_PROBES = {
    "attention_pattern": {"layer": 1},
    "head_scores": {"length": 8, "sequences": 2, "ablation": "mean"},
    "head_reading": {"layer": 1, "head": 2},
    "ablation_scan": {"ablation": "mean"},
}


def test_a_dropped_norm_offset_gives_another_copying() -> None:
    """Gemma multiplies by 1 + γ: with γ alone no head's copying score is right."""
    loaded = tiny_model("gemma2")
    expected = [ov_copying_by_hand(loaded, layer, 1) for layer in range(3)]
    right, _ = every_copying(loaded, silent)
    assert right[:, 1] == pytest.approx(expected, abs=2e-4)
    broken = dataclasses.replace(loaded, anatomy=dataclasses.replace(loaded.anatomy, norm_offset=0.0))
    wrong, _ = every_copying(broken, silent)
    assert np.abs(wrong[:, 1] - expected).max() > 1e-2
    with pytest.raises(CannotMeasure, match="is not γ"):
        get("probe", "head_reading").run(
            broken, PROMPT, silent, get("probe", "head_reading").parse({"layer": 1})
        )


class PackedLinear(torch.nn.Module):
    """A linear layer that keeps its weight as integers, as quantized kernels do."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features = plain.in_features
        self.scale = plain.weight.abs().max() / 127
        self.weight = torch.nn.Parameter(
            (plain.weight / self.scale).round().to(torch.int8), requires_grad=False
        )
        self.bias = plain.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_weight_answers_for_the_unit_vectors(bias: bool) -> None:
    torch.manual_seed(0)
    packed = PackedLinear(torch.nn.Linear(6, 4, bias=bias))
    with torch.inference_mode():
        assert torch.allclose(dense_weight(packed), (packed.weight.float() * packed.scale).T, atol=1e-6)


def test_composition_of_a_head_that_reads_exactly_what_another_writes() -> None:
    """Rank-one circuits in line give 1, at right angles 0; random ones are near chance."""
    along, across = torch.eye(8)[:1], torch.eye(8)[1:2]

    def head(reads: torch.Tensor, writes: torch.Tensor) -> HeadWeights:
        return HeadWeights(reads.T[None], reads.T[None], reads.T[None], writes[None])

    earlier = head(across, along)
    reader = composition(head(along, across), 0, earlier)
    assert {name: float(value) for name, value in reader.items()} == pytest.approx({"q": 1, "k": 1, "v": 1})
    stranger = composition(head(across, along), 0, earlier)
    assert {name: float(value) for name, value in stranger.items()} == pytest.approx({"q": 0, "k": 0, "v": 0})
    assert chance_composition(64, 8) == pytest.approx(1 / 8, rel=0.15)
    left, right = torch.randn(2, 8, 3), torch.randn(2, 3, 8)
    assert torch.allclose(product_norm(left, right), (left @ right).norm(dim=(1, 2)), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("id_", HEAD_PROBES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_half_precision_gives_finite_numbers(
    family: str, id_: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    loaded = open_model(ModelRef(str(tiny_folder(family, tmp_path))))
    loaded.model.to(dtype)
    method = get("probe", id_)
    result = method.run(loaded, PROMPT, silent, method.parse(HEAD_PROBES[id_]))
    for name, frame in result.frames.items():
        assert np.isfinite(frame.select_dtypes("number").to_numpy(dtype=float)).all(), name
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 0.5
