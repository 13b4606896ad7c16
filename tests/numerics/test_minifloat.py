"""Narrow floats: every code's number and every rounding against torch, ml_dtypes and published vectors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4
from compressed_tensors.quantization.utils.fp6_utils import cast_to_fp6
from hypothesis import given, settings
from hypothesis import strategies as st

from core.numerics.minifloat import E2M1, E2M3, E4M3, FLOAT16, FLOAT32, MINIFLOATS, Minifloat
from core.numerics.narrow import decode, encode, pack_codes, unpack_codes

TORCH = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
}  # fmt: skip
NARROW = [one for one in MINIFLOATS.values() if one.bits <= 8]


def numbers(one: Minifloat) -> torch.Tensor:
    """Random numbers of every magnitude, every value of a narrow format, and every tie."""
    random = np.random.default_rng(0)
    spread = random.standard_normal(4000) * 2.0 ** random.uniform(-20, np.log2(one.largest), 4000)
    grid = one.values() if one.bits <= 8 else np.array([one.largest, one.smallest, one.smallest_normal, 0.0])
    every = np.concatenate([spread, grid, (grid[1:] + grid[:-1]) / 2])
    return torch.tensor(np.clip(every, -one.largest, one.largest), dtype=torch.float32)


@pytest.mark.parametrize("name", TORCH)
def test_rounding_equals_torchs_cast(name: str) -> None:
    one = MINIFLOATS[name]
    values = numbers(one)
    cast = values.to(TORCH[name]).double().numpy()
    assert np.array_equal(one.round(values.numpy()), cast)
    limits = torch.finfo(TORCH[name])
    assert (one.largest, one.smallest_normal) == (limits.max, limits.smallest_normal)


def test_float32_is_itself() -> None:
    values = np.float32(np.random.default_rng(1).standard_normal(100))
    assert np.array_equal(FLOAT32.round(values), values)
    assert FLOAT32.encode(1.0) == 0x3F800000


@pytest.mark.parametrize("one", NARROW, ids=lambda one: one.name)
def test_every_code_and_rounding_equals_ml_dtypes(one: Minifloat) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    theirs = getattr(ml_dtypes, f"float{one.bits}_{one.name}" + ("" if one.specials == "ieee" else "fn"))
    codes = np.arange(1 << one.bits, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(one.decode(codes), codes.view(theirs).astype(float), equal_nan=True)
    values = numbers(one)
    assert np.array_equal(one.round(values.numpy()), values.numpy().astype(theirs).astype(float))


@pytest.mark.parametrize("one", NARROW, ids=lambda one: one.name)
def test_tensors_round_like_numbers(one: Minifloat) -> None:
    values = numbers(one)
    assert np.array_equal(encode(values, one).numpy(), one.encode(values.numpy()))
    assert np.array_equal(decode(encode(values, one), one).numpy(), one.round(values.numpy()))
    beyond = torch.tensor([one.largest * 3, -one.largest * 3])
    assert decode(encode(beyond, one), one).tolist() == [one.largest, -one.largest]


def test_published_vectors() -> None:
    # OCP FP8: subnormal step 2^-9, ties to even.
    fp8 = [2.0**-9, 2.0**-10, 0.0014, 1.03125, 1.0625, 1.09375, 447, 465]
    assert E4M3.round(fp8).tolist() == [2.0**-9, 0, 0.001953125, 1, 1, 1.125, 448, 448]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.1])
    assert E2M1.round(ties.numpy()).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert np.array_equal(E2M1.round(ties.numpy()), cast_to_fp4(ties.clone()).numpy())
    values = numbers(E2M3)
    assert np.array_equal(E2M3.round(values.numpy()), cast_to_fp6(values).numpy())


def test_spacing_is_the_distance_to_the_next_value() -> None:
    for one in NARROW:
        positive = one.values()[one.values() >= 0]
        for value, following in pairwise(positive):
            assert one.spacing(value) == following - value
    assert FLOAT16.spacing(2048) == 2


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([4, 6]), rows=st.integers(1, 5), runs=st.integers(1, 30), seed=st.integers(0, 99))
def test_packing_loses_nothing(bits: int, rows: int, runs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 4 * runs), dtype=torch.uint8, generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, 4 * runs * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes)
