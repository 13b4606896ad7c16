"""Formats with shared scales: stored bytes and read-back values equal compressed-tensors'; published scale vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

from core.numerics import nf4
from core.numerics.clipping import clipped
from core.numerics.minifloat import MINIFLOATS
from core.numerics.mx import shared_exponent
from core.numerics.nf4 import CODEBOOK, dynamic_codebook
from core.numerics.packed import PackedTensor
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
from core.numerics.sizes import entries_of, scheme_bits

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(40, 192, generator=GENERATOR) * torch.rand(40, 1, generator=GENERATOR) * 0.1
WEIGHT[3] = 0
RULES = ("floor", "ceil", "even")
MX = [MxScheme(element, rule) for element in ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2") for rule in RULES]
FLOAT8 = [FloatScheme("float8_e4m3fn", scale) for scale in ("tensor", "row", "block")]
TERNARY = [TernaryScheme(64), TernaryScheme(None, "absmean")]
WHOLE = [IntegerScheme(bits, None, symmetric, True) for bits in (4, 8) for symmetric in (True, False)]
STORED: list[Scheme] = [*MX, *FLOAT8, Nvfp4Scheme(), *TERNARY, *WHOLE]
FORMAT = {4: "mxfp4-pack-quantized", 6: "mxfp6-pack-quantized", 8: "mxfp8-quantized"}


def theirs(scheme: Scheme) -> tuple[str, QuantizationArgs]:
    """compressed-tensors' name and arguments for a scheme that it can hold."""
    common = {"symmetric": True, "dynamic": False}
    match scheme:
        case MxScheme():
            args = {"num_bits": scheme.bits, "type": "float", "strategy": "group", "group_size": 32}
            return FORMAT[scheme.bits], QuantizationArgs(**args, **common, scale_dtype=torch.uint8)
        case Nvfp4Scheme():
            args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
            return "nvfp4-pack-quantized", QuantizationArgs(**args, **common, scale_dtype=torch.float8_e4m3fn)
        case FloatScheme():
            how = {"row": {"strategy": "channel"}, "tensor": {"strategy": "tensor"}}.get(
                scheme.scale, {"strategy": "block", "block_structure": [128, 128]}
            )
            return "float-quantized", QuantizationArgs(num_bits=8, type="float", **how, **common)
        case TernaryScheme():
            grouped = (
                {"strategy": "group", "group_size": 64} if scheme.group_size else {"strategy": "channel"}
            )
            return "pack-quantized", QuantizationArgs(num_bits=2, **grouped, **common)
    raise AssertionError(scheme)


HELD = [
    s for s in (*MX, *FLOAT8, Nvfp4Scheme(), *TERNARY) if getattr(s, "element", "") not in ("e3m2", "e5m2")
]


@pytest.mark.parametrize("scheme", HELD, ids=lambda s: s.label)
def test_compressed_tensors_reads_back_our_values_from_our_tensors(scheme: Scheme) -> None:
    format_, args = theirs(scheme)
    packed = quantize(WEIGHT, scheme)
    compressor = BaseCompressor.get_value_from_registry(format_)
    description = QuantizationScheme(targets=["Linear"], weights=args, format=format_)
    read = compressor.decompress(packed.stored(), description)["weight"]
    assert read.dtype == packed.dequantize().dtype
    assert torch.equal(read, packed.dequantize())


@pytest.mark.parametrize(
    "scheme", [s for s in HELD if not isinstance(s, TernaryScheme)], ids=lambda s: s.label
)
def test_compressed_tensors_writes_the_same_bytes(scheme: Scheme) -> None:
    """Given the same scales; of the even rule of 4 and 6 bits and of NVFP4 the scales too are its own."""
    format_, args = theirs(scheme)
    stored = quantize(WEIGHT, scheme).stored()
    scale, whole = stored["weight_scale"], {}
    if isinstance(scheme, MxScheme):
        scale = 2.0 ** (scale.float() - 127)
        if scheme.rule == "even" and scheme.bits < 8:
            largest = WEIGHT.view(40, -1, 32).abs().amax(-1)
            assert torch.equal(scale, calculate_qparams(-largest, largest, args)[0])
    if isinstance(scheme, Nvfp4Scheme):
        largest = WEIGHT.view(40, -1, 16).abs().amax(-1)
        whole = {"weight_global_scale": generate_gparam(WEIGHT.min(), WEIGHT.max())}
        scale = calculate_qparams(-largest, largest, args, whole["weight_global_scale"])[0]
    description = QuantizationScheme(targets=["Linear"], weights=args, format=format_)
    compressor = BaseCompressor.get_value_from_registry(format_)
    written = compressor.compress({"weight": WEIGHT.clone(), "weight_scale": scale, **whole}, description)
    assert set(written) == set(stored)
    for name, tensor in written.items():
        assert torch.equal(
            tensor.contiguous().view(torch.uint8), stored[name].contiguous().view(torch.uint8)
        ), name


@pytest.mark.parametrize("scheme", STORED, ids=lambda s: s.label)
def test_sizes_by_formula_are_those_of_the_tensors(scheme: Scheme) -> None:
    packed = quantize(WEIGHT, scheme)
    stored = {name: (tuple(t.shape), t.nbytes) for name, t in packed.stored().items()}
    assert {n: (e.shape, e.nbytes) for n, e in entries_of(40, 192, scheme).items()} == stored
    assert packed.stored_bytes == sum(nbytes for _, nbytes in stored.values())


def test_known_bits_per_weight() -> None:
    large = (4096, 4096)
    expected = {
        MxScheme("e2m1"): 4.25, MxScheme("e2m3"): 6.25, MxScheme("e4m3"): 8.25, Nvfp4Scheme(): 4.5, Nf4Scheme(): 4.5,
        Nf4Scheme(True): 4 + 8 / 64 + 32 / (64 * 256), TernaryScheme(128): 2.125,
    }  # fmt: skip
    for scheme, bits in expected.items():
        assert scheme_bits(large, scheme) == pytest.approx(bits, abs=1e-3)


def test_shared_exponents_of_the_three_rules() -> None:
    """Biased E8M0 exponents for (floor, ceil, even), as measured with torchao."""
    e4m3 = {
        448: (127, 127, 127), 449: (127, 128, 127), 500: (127, 128, 128), 512: (128, 128, 128), 1.0: (119, 119, 119),
        0.9: (118, 119, 118), 6: (121, 121, 121),
    }  # fmt: skip
    e2m1 = {
        6: (127, 127, 127), 6.1: (127, 128, 127), 7: (127, 128, 128), 8: (128, 128, 128), 1: (125, 125, 125),
        0.5: (124, 124, 124), 0: (0, 0, 0),
    }  # fmt: skip
    for element, vectors in (("e4m3", e4m3), ("e2m1", e2m1)):
        for largest, expected in vectors.items():
            one = torch.tensor([float(largest)])
            assert tuple(shared_exponent(one, MINIFLOATS[element], rule).item() for rule in RULES) == expected


@pytest.mark.parametrize("scheme", [*MX, Nf4Scheme(), TernaryScheme(64)], ids=lambda s: s.label)
def test_rounding_what_is_rounded_changes_nothing(scheme: Scheme) -> None:
    once = quantize(WEIGHT, scheme).dequantize().float()
    again = quantize(once, scheme).dequantize().float()
    # A ternary scale is kept in float16, whose mean over equal values is itself.
    assert torch.equal(once, again)


@pytest.mark.parametrize("scheme", MX, ids=lambda s: s.label)
def test_every_weight_goes_to_the_nearest_value(scheme: MxScheme) -> None:
    packed = quantize(WEIGHT[:4], scheme)
    assert isinstance(packed, PackedTensor)
    scale = 2.0 ** (packed.scale.double() - 127).repeat_interleave(32, 1)
    grid = torch.tensor(scheme.minifloat.values())
    nearest = (WEIGHT[:4].double().unsqueeze(-1) - scale.unsqueeze(-1) * grid).abs().amin(-1)
    assert torch.equal((WEIGHT[:4].double() - packed.dequantize().double()).abs(), nearest)


def test_only_the_floor_rule_clips() -> None:
    assert clipped(WEIGHT, quantize(WEIGHT, MxScheme("e2m1", "floor"))).any()
    assert not clipped(WEIGHT, quantize(WEIGHT, MxScheme("e2m1", "ceil"))).any()
    assert not clipped(WEIGHT, quantize(WEIGHT, IntegerScheme(4, 32, True))).any()


# --- NF4 and ternary ----------------------------------------------------------------------------------


def test_nf4_keeps_its_own_values_and_has_sixteen() -> None:
    values = torch.tensor([*CODEBOOK * 4]).view(1, 64) * 0.37
    packed = quantize(values, Nf4Scheme())
    assert torch.allclose(packed.dequantize(), values, rtol=0, atol=1e-8)
    assert packed.dequantize().unique().numel() == 16
    assert len(dynamic_codebook()) == 256


def test_nf4s_codebook_is_quantiles_of_a_normal_distribution() -> None:
    from scipy.stats import norm

    offset = 0.9677083  # QLoRA: mean of 1 - 1/(2 · 15) and 1 - 1/(2 · 16)
    upper = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    lower = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([*upper, 0.0, *lower])
    assert np.allclose(values / values.max(), CODEBOOK, atol=1e-6)


@pytest.mark.parametrize("double", [False, True])
def test_nf4_equals_bitsandbytes(double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = WEIGHT[:, :128].contiguous() + 1e-3
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    ours = nf4.quantize(weight, Nf4Scheme(double))
    pairs = packed.flatten()
    assert torch.equal(torch.stack([pairs >> 4, pairs & 15], -1).view(weight.shape), ours.codes)
    assert torch.allclose(functional.dequantize_4bit(packed, state), ours.dequantize(), rtol=0, atol=1e-7)
    parts = {k: v for k, v in state.as_dict(packed=True).items() if "quant_state" not in k}
    assert ours.stored_bytes == packed.nbytes + sum(v.nbytes for v in parts.values())


def test_the_ternary_scale_is_the_best_of_all_thresholds() -> None:
    group = WEIGHT[0, :64]
    ours = quantize(group[None], TernaryScheme(64)).dequantize().float()[0]
    best = min(
        float(((group - torch.where(group.abs() >= t, group[group.abs() >= t].abs().mean() * group.sign(), 0.0)) ** 2).sum())
        for t in group.abs()
    )  # fmt: skip
    assert float(((group - ours) ** 2).sum()) == pytest.approx(best, rel=1e-3)
    assert (
        float(((group - quantize(group[None], TernaryScheme(64, "absmean")).dequantize().float()) ** 2).sum())
        > best
    )
