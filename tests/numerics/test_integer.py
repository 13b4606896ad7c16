"""Rounding to nearest: its error bound, its fixed points, and two other implementations of it."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as ct_quantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams

from core.numerics.integer import code_range, quantize, storable_dtype
from core.numerics.packed import PackedTensor, narrow
from core.numerics.schemes import FloatScheme, IntegerScheme
from tests.references.integer_grid import rtn_row

SCHEMES = [
    IntegerScheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (32, 64, None)
    for symmetric in (True, False)
]
WEIGHT = torch.randn(24, 192, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_no_weight_moves_more_than_half_a_step(scheme: IntegerScheme) -> None:
    packed = quantize(WEIGHT, scheme, scale_dtype=torch.float32)
    steps = packed.scale.repeat_interleave(WEIGHT.shape[1] // packed.scale.shape[1], dim=1)
    gap = (packed.dequantize() - WEIGHT).abs() / steps
    # Symmetric: the clipped extreme hits exactly 0.5. Affine: the rounded zero point may clip an end by half more.
    bound = 0.5 if scheme.symmetric else 1.0
    assert float(gap.max()) <= bound + 1e-4
    assert float(gap.max()) > 0.4
    low, high = code_range(scheme.bits)
    inner = (packed.codes > low) & (packed.codes < high)
    assert float(gap[inner].max()) <= 0.5 + 1e-4


def test_the_symmetric_extreme_moves_exactly_half_a_step() -> None:
    packed = quantize(
        torch.tensor([[7.5] + [0.0] * 31]), IntegerScheme(4, 32, True), scale_dtype=torch.float32
    )
    assert packed.scale.item() == 1.0
    assert packed.dequantize()[0, 0].item() == 7.0


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_rounding_what_is_on_the_grid_changes_nothing(scheme: IntegerScheme) -> None:
    once = quantize(WEIGHT, scheme, scale_dtype=torch.float32)
    groups = once.dequantize().unflatten(-1, (once.scale.shape[1], -1)) / once.scale.unsqueeze(-1)
    if once.zero_point is not None:
        groups = groups + once.zero_point.unsqueeze(-1)
    assert torch.equal(groups.round().to(torch.int8).flatten(-2), once.codes)


def test_affine_rounding_twice_from_scratch_is_rounding_once() -> None:
    scheme = IntegerScheme(4, 32, False)
    # Both ends on the grid, so that the second grid is the first.
    ends = WEIGHT.clone().unflatten(-1, (-1, 32)).clamp_(-3, 3)
    ends[..., 0], ends[..., 1] = -3.0, 4.5
    once = quantize(ends.flatten(-2), scheme, scale_dtype=torch.float32).dequantize()
    assert torch.equal(quantize(once, scheme, scale_dtype=torch.float32).dequantize(), once)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_equals_the_obvious_loop(scheme: IntegerScheme) -> None:
    rows = WEIGHT[:2].double()
    packed = quantize(WEIGHT[:2], scheme, scale_dtype=torch.float32)
    for index, row in enumerate(rows.tolist()):
        group = scheme.group_size or len(row)
        expected = rtn_row(row, scheme.bits, group, symmetric=scheme.symmetric)
        codes, scales, zeros = (
            torch.tensor(part, dtype=torch.float64) for part in zip(*expected, strict=True)
        )
        # float32 may send a value that is within rounding error of a tie the other way; nothing else may differ.
        scaled = rows[index] / scales + zeros
        from_tie = (scaled - scaled.floor() - 0.5).abs()
        differs = packed.codes[index] != codes
        assert (from_tie[differs] < 1e-3).all()
        assert ((packed.codes[index] - codes).abs() <= 1).all()
        assert torch.allclose(packed.scale[index], scales[::group].float(), rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_compressed_tensors(scheme: IntegerScheme, dtype: torch.dtype) -> None:
    args = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
    )
    groups = WEIGHT.unflatten(-1, (scheme.groups(192), -1))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    packed = quantize(WEIGHT, scheme, scale_dtype=dtype)
    assert torch.equal(packed.scale, scale.to(dtype))
    if dtype is torch.float32:
        zero = None if scheme.symmetric else zero
        assert scheme.symmetric or torch.equal(packed.zero_point, zero)
        assert torch.equal(packed.codes, ct_quantize(WEIGHT, scale, zero, args, dtype=torch.int8))
    reread = ct_dequantize(packed.codes, packed.scale, packed.zero_point, args)
    assert torch.equal(packed.dequantize(), reread)


def test_error_falls_with_every_bit_and_with_smaller_groups() -> None:
    def error(bits: int, group: int | None) -> float:
        return float((quantize(WEIGHT, IntegerScheme(bits, group, False)).dequantize() - WEIGHT).norm())

    assert error(8, 32) < error(4, 32) < error(3, 32) < error(2, 32)
    assert error(4, 32) < error(4, 64) < error(4, None)


def test_an_all_zero_group_stays_zero() -> None:
    for symmetric in (True, False):
        packed = quantize(torch.zeros(2, 64), IntegerScheme(4, 32, symmetric))
        assert not packed.dequantize().any()


def test_scales_that_float16_cannot_hold_are_kept_in_float32() -> None:
    assert storable_dtype(torch.tensor([1e-3]), bits=8) is torch.float16
    assert storable_dtype(torch.tensor([1e-3, 1e-6]), bits=8) is torch.float32
    assert storable_dtype(torch.tensor([1e-3, 1e5]), bits=8) is torch.float32
    tiny = quantize(WEIGHT * 1e-6, IntegerScheme(8, None, True))
    assert tiny.scale.dtype is torch.float32


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_beyond_float16_stay_finite(symmetric: bool) -> None:
    """Their scales would fit into float16, but not scale times code."""
    large = WEIGHT * 1e5
    for bits in (2, 4, 8):
        assert torch.isfinite(quantize(large, IntegerScheme(bits, 32, symmetric)).dequantize()).all()


def test_a_scale_too_small_for_its_dtype_never_becomes_zero() -> None:
    packed = quantize(WEIGHT * 1e-9, IntegerScheme(4, 32, True), scale_dtype=torch.float16)
    assert (packed.scale > 0).all()
    assert not packed.codes.any()  # far below half a step: all rounded to zero, none to an undefined code


def test_float8_rounds_to_nearest_even() -> None:
    # Open Compute FP8 e4m3 vectors: subnormal step 2^-9, ties to even.
    values = torch.tensor([[2.0**-9, 2.0**-10, 1.03125, 1.0625, 1.09375, 447.0]])
    packed: PackedTensor = narrow(values, FloatScheme("float8_e4m3fn"))
    assert packed.dequantize().float().tolist() == [[2.0**-9, 0.0, 1.0, 1.0, 1.125, 448.0]]
