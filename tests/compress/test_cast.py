"""Casting: nearest 16-bit values everywhere, buffers alone, overflow refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import CannotCompress
from tests.compress.making import apply, own_model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_parameter_becomes_its_nearest_value(dtype: str, tmp_path: Path) -> None:
    loaded = own_model("smollm", tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    frequencies = loaded.model.model.rotary_emb.inv_freq.clone()
    result = apply(loaded, "cast", dtype=dtype)
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name].to(getattr(torch, dtype)))
    assert torch.equal(loaded.model.model.rotary_emb.inv_freq, frequencies)
    assert frequencies.dtype is torch.float32
    assert result.frame["touched"].all()
    assert result.frame["bytes_after"].sum() * 2 == result.frame["bytes_before"].sum()
    # Half a unit in the last of 8 or 11 significant bits.
    assert result.frame["relative_error"].max() < (2**-8 if dtype == "bfloat16" else 2**-11)


def test_float16_overflow_is_refused_before_anything_changes(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    loaded.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e5
    with pytest.raises(
        CannotCompress, match=r"float16 ends at 65504 but model\.layers\.1\.mlp\.down_proj holds 100000"
    ):
        apply(loaded, "cast", dtype="float16")
    assert loaded.dtype == "float32"
    apply(loaded, "cast", dtype="bfloat16")
