"""GPTQ against the book, its known answers, and a job that was stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.compress import gptq as method
from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.numerics.integer import quantize
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme
from core.quantize.columns import Part, gptq, inverse_factor
from core.quantize.grid_fit import Grid
from core.types import Documents, Result, silent
from tests.compress.making import own_model
from tests.references.slow_gptq import layer_loss, slow_gptq
from tests.tiny import CORPUS

OUTPUTS, INPUTS, TOKENS = 12, 160, 400
TEXT = Documents("corpus", "calibration", CORPUS * 20)


def correlated(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [O, I] and inputs [T, I] whose columns depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(TOKENS, INPUTS, generator=generator) @ torch.randn(INPUTS, INPUTS, generator=generator)
    return torch.randn(OUTPUTS, INPUTS, generator=generator), x_TI / INPUTS**0.5


def part_of(packed: PackedTensor, *, along_outputs: bool = False) -> Part:
    """The grid of one matrix as a single problem; ``packed`` is stored [in, out] where groups run along outputs."""
    assert packed.scale is not None
    zero = None if packed.zero_point is None else packed.zero_point[None].float()
    return Part(
        Grid(packed.scheme, packed.scale[None], zero),
        OUTPUTS,
        packed.scheme.group_size or INPUTS,
        along_outputs,
    )  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize(
    ("bits", "symmetric", "act_order"), [(4, True, True), (3, False, True), (2, False, False)]
)
def test_codes_are_those_of_the_book(bits: int, symmetric: bool, act_order: bool) -> None:
    weight_OI, x_TI = correlated()
    gram_II = x_TI.T @ x_TI
    packed = quantize(weight_OI, IntegerScheme(bits, 32, symmetric))
    found = gptq(
        weight_OI.T[None].clone(), gram_II[None], [part_of(packed)], damping=0.01, act_order=act_order
    )
    assert packed.scale is not None
    scale_OI = packed.scale.double().repeat_interleave(32, 1).numpy()
    zero_OI = np.zeros_like(scale_OI)
    if packed.zero_point is not None:
        zero_OI = packed.zero_point.double().repeat_interleave(32, 1).numpy()
    wanted_OI = slow_gptq(
        weight_OI.double().numpy(),
        gram_II.double().numpy(),
        scale_OI,
        zero_OI,
        bits=bits,
        damping=0.01,
        act_order=act_order,
    )
    ours_OI = found.codes_NIO[0].T.double().numpy()
    assert (ours_OI == wanted_OI).mean() > 0.99  # a tie that float32 breaks otherwise moves what follows
    losses = [
        layer_loss(weight_OI.double().numpy(), (codes - zero_OI) * scale_OI, x_TI.double().numpy())
        for codes in (ours_OI, wanted_OI, packed.codes.double().numpy())
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] < 0.7 * losses[2]


@pytest.mark.parametrize("along_outputs", [False, True])
def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest_bit_for_bit(
    along_outputs: bool,
) -> None:
    weight_OI, _ = correlated()
    stored = weight_OI.T if along_outputs else weight_OI
    packed = quantize(stored, IntegerScheme(3, None if along_outputs else 32, False))
    part = part_of(packed, along_outputs=along_outputs)
    if along_outputs:
        part = Part(part.grid, OUTPUTS, OUTPUTS, along_outputs=True)
    diagonal_I = torch.rand(INPUTS, generator=torch.Generator().manual_seed(1))
    diagonal_I[7] = 0  # never active
    for gram_II in (torch.eye(INPUTS), torch.diag(diagonal_I)):
        found = gptq(weight_OI.T[None].clone(), gram_II[None], [part], damping=0.01, act_order=True)
        codes = found.codes_NIO[0] if along_outputs else found.codes_NIO[0].T
        assert torch.equal(codes, packed.codes)


def test_problems_and_matrices_side_by_side_are_rounded_as_alone() -> None:
    scheme = IntegerScheme(3, 32, True)
    drawn = [correlated(seed) for seed in range(2)]
    grams = [x_TI.T @ x_TI for _, x_TI in drawn]
    packed = [quantize(weight_OI, scheme) for weight_OI, _ in drawn]
    alone = [
        gptq(w.T[None].clone(), gram[None], [part_of(p)], damping=0.01, act_order=True).codes_NIO[0]
        for (w, _), gram, p in zip(drawn, grams, packed, strict=True)
    ]
    scale_NOG = torch.stack([p.scale for p in packed if p.scale is not None])
    both = Part(Grid(scheme, scale_NOG, None), OUTPUTS, 32, along_outputs=False)
    weight_NIO = torch.stack([w.T for w, _ in drawn])
    side_by_side = gptq(
        weight_NIO.repeat(1, 1, 2), torch.stack(grams), [both, both], damping=0.01, act_order=True
    )
    for n, codes_IO in enumerate(alone):
        assert torch.equal(side_by_side.codes_NIO[n, :, :OUTPUTS], codes_IO)
        assert torch.equal(side_by_side.codes_NIO[n, :, OUTPUTS:], codes_IO)


def test_damping_is_raised_where_it_must_be_and_what_cannot_be_factored_is_said() -> None:
    _, x_TI = correlated()
    good_II = x_TI.T @ x_TI
    worse_II = good_II - 0.05 * good_II.diagonal().mean() * torch.eye(INPUTS)  # not positive, until damped
    hopeless_II = torch.full((INPUTS, INPUTS), torch.inf)
    factor_NII, damping_N = inverse_factor(torch.stack([good_II, worse_II, hopeless_II]), damping=0.01)
    assert damping_N[0] == pytest.approx(0.01)
    assert 0.01 < damping_N[1] <= 1
    assert damping_N[2].isnan()
    damped_II = good_II + 0.01 * good_II.diagonal().mean() * torch.eye(INPUTS)
    assert torch.allclose(factor_NII[0].T @ factor_NII[0] @ damped_II, torch.eye(INPUTS), atol=1e-2)


def run(loaded: LoadedModel, scratch: Path | None = None, **settings: object) -> Result:
    chosen = method.GptqSettings.model_validate({"samples": 8, "sample_tokens": 64, **settings})
    return method.run(loaded, TEXT, silent, scratch, chosen)


@pytest.mark.parametrize("family", ["smollm", "gpt2", "bert", "deepseek_v3"])
def test_no_matrix_moves_its_outputs_more_than_rounding_to_nearest_does(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    result = run(loaded, bits=3)
    layers = result.frames["layers"]
    assert (layers["loss"] <= layers["loss_nearest"]).all()
    used = layers[layers["tokens"] > 0]
    assert used["loss"].sum() < 0.6 * used["loss_nearest"].sum()
    assert (layers[layers["tokens"] == 0]["rounded_by"] == "nearest: no token reached it").all()
    assert result.frame["parameters"].sum() == sum(p.numel() for p in loaded.model.parameters())
    for name, packed in loaded.packed.items():
        owner = (
            loaded.model.get_submodule(name)
            if f"{name}.weight" in dict(loaded.model.named_parameters())
            else None
        )
        parameter = loaded.model.get_parameter(name) if owner is None else owner.weight
        assert torch.equal(parameter, packed.dequantize().to(parameter.dtype)), name


def test_a_fitted_grid_loses_less_still(tmp_path: Path) -> None:
    plain, fitted = (
        run(own_model("smollm", tmp_path / str(fit)), bits=2, fit_grid=fit).frames["layers"]
        for fit in (False, True)
    )
    assert fitted["loss"].sum() < plain["loss"].sum()


def test_experts_that_no_file_could_hold_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    loaded = own_model("gpt_oss", tmp_path)
    with pytest.raises(CannotCompress, match="stores all experts of a layer in one tensor"):
        run(loaded)
    assert not loaded.packed


class _Killed(Exception):
    pass


def test_a_job_that_was_stopped_goes_on_to_the_same_codes(tmp_path: Path) -> None:
    whole, stopped, again = (own_model("mixtral", tmp_path / name) for name in ("whole", "stopped", "again"))
    expected = run(whole, bits=3)

    def kill(done: float, total: float, message: str) -> None:
        if done / total > 0.5:
            raise _Killed

    settings = method.GptqSettings(bits=3, samples=8, sample_tokens=64)
    with pytest.raises(_Killed):
        method.run(stopped, TEXT, kill, tmp_path / "scratch", settings)
    assert list((tmp_path / "scratch").rglob("block_0000.safetensors"))
    result = method.run(again, TEXT, silent, tmp_path / "scratch", settings)
    for module, packed in whole.packed.items():
        ours = again.packed[module]
        assert isinstance(packed, PackedTensor)
        assert isinstance(ours, PackedTensor)
        assert torch.equal(ours.codes, packed.codes), module
    for ours_, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours_, theirs)
    assert result.frames["layers"].equals(expected.frames["layers"])
    assert result.frame.equals(expected.frame)
