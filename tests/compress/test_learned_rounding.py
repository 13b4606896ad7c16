"""Learned rounding begins at rounding to nearest, never ends worse, and is the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.compress import learned_rounding as method
from core.models.loaded import LoadedModel
from core.numerics.integer import quantize
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme
from core.quantize.learned import Rounding
from core.types import Documents, Result, silent
from tests.compress.making import apply, own_model
from tests.tiny import CORPUS

TEXT = Documents("corpus", "calibration", CORPUS * 20)


def run(loaded: LoadedModel, **settings: object) -> Result:
    chosen = method.LearnedRoundingSettings.model_validate(
        {"samples": 8, "sample_tokens": 32, "batch": 4, "bits": 2, **settings}
    )
    with torch.inference_mode():  # as the pipeline calls it
        return method.run(loaded, TEXT, silent, None, chosen)


def codes_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {
        module: packed.codes for module, packed in loaded.packed.items() if isinstance(packed, PackedTensor)
    }


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
def test_without_updates_it_is_rounding_to_nearest(scheme: str, tmp_path: Path) -> None:
    ours, nearest = own_model("mixtral", tmp_path / "ours"), own_model("mixtral", tmp_path / "nearest")
    run(ours, iterations=0, scheme=scheme)
    apply(nearest, "rtn", bits=2, scheme=scheme)
    for module, codes in codes_of(nearest).items():
        assert torch.equal(codes_of(ours)[module], codes), module
    for one, other in zip(ours.model.parameters(), nearest.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_every_block_ends_better_and_the_same_every_time(family: str, tmp_path: Path) -> None:
    first, second = own_model(family, tmp_path / "first"), own_model(family, tmp_path / "second")
    curve = run(first, iterations=10).frames["blocks"]
    best = curve.groupby("layer")["loss_left"].min()
    assert (best < 0.9).all()
    run(second, iterations=10)
    for module, codes in codes_of(first).items():
        assert torch.equal(codes_of(second)[module], codes), module
    for module, packed in first.packed.items():
        name = f"{module}.weight" if f"{module}.weight" in dict(first.model.named_parameters()) else module
        parameter = first.model.get_parameter(name)
        assert torch.equal(parameter, packed.dequantize().to(parameter.dtype)), module
        assert not parameter.requires_grad


def test_a_shift_never_moves_a_value_by_more_than_a_step() -> None:
    weight_RC = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight_RC, IntegerScheme(4, 32, False))
    rounding = Rounding.nearest(weight_RC, packed)
    for learned in rounding.learned:
        learned.requires_grad_(True)
    (rounding.values() * torch.randn(8, 64, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert rounding.shift_RGK.grad is not None
    assert (rounding.shift_RGK.grad != 0).float().mean() > 0.9
    rounding.reach_RG2.grad = torch.zeros_like(rounding.reach_RG2)
    rounding.step(10.0)  # far beyond what is allowed
    assert rounding.shift_RGK.abs().max() == 0.5
    moved = rounding.packed().codes.int() - packed.codes.int()
    assert moved.abs().max() == 1
