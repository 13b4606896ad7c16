"""Packing equals the obvious bit-by-bit version and compressed-tensors, and loses nothing."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from core.numerics.packing import pack, packed_words, unpack
from tests.references.integer_grid import pack_row

shapes = st.tuples(st.integers(1, 5), st.integers(1, 101))


def codes_of(shape: tuple[int, int], bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_round_trip_and_size(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = codes_of(shape, bits, seed)
    packed = pack(codes, bits)
    assert packed.shape == (shape[0], packed_words(shape[1], bits))
    assert torch.equal(unpack(packed, bits, shape[1]), codes)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_equals_compressed_tensors(shape: tuple[int, int], bits: int, seed: int) -> None:
    codes = codes_of(shape, bits, seed)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(pack(codes, bits), bits, torch.Size(shape)), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_bit_by_bit(bits: int) -> None:
    codes = codes_of((3, 45), bits, bits)
    unsigned = [[word % 2**32 for word in row] for row in pack(codes, bits).tolist()]
    assert unsigned == [pack_row(row, bits) for row in codes.tolist()]
