"""Rotation: exact in every family it takes, spreads outliers, says what a tie costs, and refuses the rest by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CannotCompress
from core.models.open import open_model
from core.quantize.rotations import hadamard_plan, rotation, rotation_around_ones
from core.types import ModelRef
from tests.compress.making import apply, own_model, save

IDS = (torch.arange(48) * 37 % 512).view(2, 24)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.double()


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 64, 144])
def test_hadamard_matrices_are_orthogonal_and_even(n: int) -> None:
    assert hadamard_plan(n) is not None
    turn = rotation(n, seed=3)
    assert torch.allclose(turn @ turn.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(turn.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), atol=1e-12)


def test_sizes_without_a_known_hadamard_are_turned_uniformly() -> None:
    for n in (3, 6, 92):
        assert hadamard_plan(n) is None
        turn = rotation(n, seed=3)
        assert torch.allclose(turn @ turn.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
        assert turn.abs().std() > 0.01
    assert not torch.equal(rotation(6, seed=1), rotation(6, seed=2))


def test_a_rotation_for_layernorm_leaves_the_ones() -> None:
    turn = rotation_around_ones(10, seed=0)
    ones = torch.ones(10, dtype=torch.float64)
    assert torch.allclose(turn @ ones, ones)
    assert torch.allclose(turn @ turn.T, torch.eye(10, dtype=torch.float64), atol=1e-12)
    assert (turn - torch.eye(10)).abs().max() > 0.1


@pytest.mark.parametrize(
    "family",
    ["smollm", "mistral", "qwen3", "gpt2", "gpt_neox", "opt", "olmoe", "qwen2_moe", "granitemoe", "gpt_oss"],
)
def test_outputs_stay_and_every_matrix_moves(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    expected = logits(loaded.model)
    tied = loaded.anatomy.tied
    result = apply(loaded, "rotate")
    got = logits(loaded.model)
    assert ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-5
    for name, parameter in loaded.model.named_parameters():
        if parameter.ndim > 1 and name in before and not name.endswith("bias"):
            assert (parameter - before[name]).norm() > 0.1 * before[name].norm(), name
    assert not loaded.anatomy.tied
    assert any("more parameters" in note for note in result.notes) == tied
    save(loaded, result, tmp_path / "variant")
    again = open_model(ModelRef(str(tmp_path / "variant")))
    assert torch.equal(logits(again.model), got)


def test_in_float64_nothing_is_left_but_its_rounding(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    loaded.model.double()

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:  # transformers' own computes in float32
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    for module in loaded.model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm.__get__(module)
    expected = logits(loaded.model)
    result = apply(loaded, "rotate", seed=5)
    assert ((logits(loaded.model) - expected).norm() / expected.norm()) < 1e-10
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 1e-10


def test_values_alone_keep_the_tie_and_the_rest(tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    expected = logits(loaded.model)
    apply(loaded, "rotate", residual=False)
    assert ((logits(loaded.model) - expected).norm() / expected.norm()) < 1e-5
    assert loaded.anatomy.tied
    moved = {n for n, p in loaded.model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.rpartition("self_attn.")[2] for name in moved} == {"v_proj.weight", "o_proj.weight"}


def test_channels_that_stand_out_are_spread(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    for layer in loaded.model.model.layers:
        layer.mlp.down_proj.weight.data[7] *= 30
    frame = apply(loaded, "rotate").frames["spread"].set_index("module")
    lines = frame[frame.index.str.endswith("down_proj")]
    assert (lines["incoherence_before"] > 15).all()
    assert (lines["incoherence"] < 6).all()


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", "with weights of its own before it is added"),
        ("deepseek_v3", "latent attention"),
        ("jamba", "Mamba"),
    ],
)
def test_what_cannot_be_turned_is_refused_unchanged(family: str, message: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    with pytest.raises(CannotCompress, match=message):
        apply(loaded, "rotate")
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
