"""The page's numpy formats are the engine's torch formats, and known distributions have their known noise."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from core.numerics.catalogue import FORMATS, GGUF_BLOCKS, NumberFormat, round_blocks, sqnr_db, store
from core.numerics.quantize import quantize
from core.numerics.schemes import (
    FloatScheme,
    IntegerScheme,
    MxScheme,
    Nf4Scheme,
    Nvfp4Scheme,
    Scheme,
    TernaryScheme,
)

WEIGHT = torch.randn(8, 128, generator=torch.Generator().manual_seed(2)) * 0.1


def scheme_of(one: NumberFormat, rule: str) -> Scheme:
    if one.family == "float":
        dtype = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}.get(one.id, one.id)
        return FloatScheme(dtype)  # type: ignore[arg-type]
    if one.id.startswith("mxfp"):
        assert one.element is not None
        return MxScheme(one.element.name, rule)  # type: ignore[arg-type]
    if one.family == "integer":
        return IntegerScheme(one.bits, 32, True)
    return {"nvfp4": Nvfp4Scheme(), "nf4": Nf4Scheme(), "ternary": TernaryScheme(32)}[one.id]


@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
@pytest.mark.parametrize("one", [f for f in FORMATS.values() if f.id != "float32"], ids=lambda f: f.id)
def test_numpy_rounds_as_torch_does(one: NumberFormat, rule: str) -> None:
    blocks = WEIGHT.double().numpy().reshape(-1, one.block or 128)
    ours = round_blocks(blocks, one, rule=rule).values_NK.reshape(WEIGHT.shape)  # type: ignore[arg-type]
    packed = quantize(WEIGHT, scheme_of(one, rule)).dequantize().double().numpy()
    # The engine rounds some products to the dtype its loader has (bfloat16, float16).
    assert np.allclose(ours, packed, rtol=2.0**-8, atol=1e-7)


def test_full_range_uniform_numbers_have_six_decibels_a_bit() -> None:
    """(2^b - 1) steps over the range: 20 log10(2^b - 1) dB, a little under 6.02 · b."""
    for bits in (2, 3, 4, 5, 6, 8):
        assert sqnr_db(FORMATS[f"int{bits}"], "uniform") == pytest.approx(
            20 * np.log10(2**bits - 1), abs=0.15
        )


def test_no_format_passes_the_gaussian_bound() -> None:
    for one in FORMATS.values():
        assert sqnr_db(one, "gaussian") < 6.0206 * one.bits_per_weight


def test_one_mantissa_bit_is_six_decibels() -> None:
    """Floats: the noise is a quarter with every mantissa bit, whatever the exponent."""
    assert sqnr_db(FORMATS["e4m3"], "gaussian") - sqnr_db(FORMATS["e5m2"], "gaussian") == pytest.approx(
        6.02, abs=0.1
    )
    wide = sqnr_db(FORMATS["float16"], "gaussian") - sqnr_db(FORMATS["bfloat16"], "gaussian")
    assert wide == pytest.approx(3 * 6.02, abs=0.1)


def test_a_stored_numbers_bits_mean_what_is_read_back() -> None:
    for one in FORMATS.values():
        for number in (0.1, -0.7, 0.0, 1.0):
            kept = store(number, one, largest=1.0)
            bits = "".join(text for _, text in kept.parts)
            assert len(bits) == one.bits
            assert abs(kept.value - number) <= max(kept.spacing, 1e-12) or kept.clipped
            if one.element is not None:
                assert float(one.element.decode(int(bits, 2))) * kept.scale == pytest.approx(kept.value)
            elif one.family == "integer":
                code = int(bits, 2) - (1 << one.bits if bits[0] == "1" else 0)
                assert code * kept.scale == pytest.approx(kept.value)


def test_known_ranges() -> None:
    assert FORMATS["e4m3"].dynamic_range_db == pytest.approx(20 * np.log10(448 / 2**-9))
    assert FORMATS["int8"].dynamic_range_db == pytest.approx(20 * np.log10(128))
    assert FORMATS["mxfp4"].bits_per_weight == 4.25
    assert FORMATS["nvfp4"].bits_per_weight == FORMATS["nf4"].bits_per_weight == 4.5


def test_gguf_block_sizes() -> None:
    gguf = pytest.importorskip("gguf")
    for name, sizes in GGUF_BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == sizes


def test_the_catalogue_needs_no_torch() -> None:
    code = "import core.numerics.catalogue as c; c.store(0.1, c.FORMATS['nf4'], largest=1.0); import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
