"""Sizes by formula equal the bytes of real files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.numerics.integer import quantize
from core.numerics.schemes import FloatScheme, IntegerScheme
from core.numerics.sizes import Entry, bits_per_weight, entries_of, file_bytes, weight_bytes

SCHEMES = [
    IntegerScheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (32, None)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_formula_equals_the_tensors_and_the_file(scheme: IntegerScheme, tmp_path: Path) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    stored = quantize(weight, scheme, scale_dtype=torch.float16).stored()
    entries = entries_of(40, 96, scheme)
    assert {name: (e.shape, e.nbytes) for name, e in entries.items()} == {
        name: (tuple(t.shape), t.nbytes) for name, t in stored.items()
    }
    save_file(stored, tmp_path / "w.safetensors", metadata={"format": "pt"})
    assert abs((tmp_path / "w.safetensors").stat().st_size - file_bytes(entries)) <= 64


def test_known_sizes() -> None:
    # int4, groups of 32, affine: 4 + 16/32 + 4/32 bits per weight, and 16 bytes for the shape.
    assert weight_bytes((64, 64), IntegerScheme(4, 32, False)) == 64 * 64 * 4.625 / 8 + 16
    assert weight_bytes((64, 64), FloatScheme("float8_e4m3fn")) == 64 * 64
    assert weight_bytes((3, 64, 64), IntegerScheme(8, None, True)) == 3 * (64 * 64 + 2 * 64 + 16)
    assert file_bytes({"a": Entry("F32", (2,))}) % 8 == 0
    assert bits_per_weight(100, 200) == 4.0
