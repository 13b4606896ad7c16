"""Weights as narrow floats: every offered format reloads bit for bit with plain transformers; the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CannotCompress
from core.quantize.narrow_floats import FormatSettings
from core.registry import get
from tests.compress.making import apply, own_model, save
from tests.saving.test_layout_mixed import assert_opens_plain, assert_reloads
from tests.tiny import tiny_model

EVERY: list[tuple[str, dict[str, Any], float]] = [
    ("fp8", {}, 8.25),
    ("fp8", {"scale": "tensor"}, 8.0),
    ("fp8", {"scale": "block"}, 8.0),
    ("fp8", {"element": "e5m2", "embedding": "bfloat16"}, 8.25),
    ("mxfp", {"bits": 4}, 4.25),
    ("mxfp", {"bits": 6, "rule": "ceil", "embedding": "same"}, 6.25),
    ("mxfp", {"bits": 8, "rule": "floor"}, 8.25),
    ("nvfp4", {"embedding": "same"}, 4.5),
]
NAMES = [f"{name} {' '.join(map(str, settings.values()))}" for name, settings, _ in EVERY]


@pytest.mark.parametrize(("method", "settings", "bits"), EVERY, ids=NAMES)
def test_every_format_reloads_bit_for_bit(
    method: str, settings: dict[str, Any], bits: float, tmp_path: Path
) -> None:
    loaded = own_model("smollm", tmp_path)
    result = apply(loaded, method, **settings)
    saved = save(loaded, result, tmp_path / "variant")
    assert_reloads(loaded, tmp_path / "variant")
    assert saved.bytes == pytest.approx(saved.predicted_bytes, rel=0.02)
    matrices = result.frame[result.frame["component"] == "mlp"]
    stored = 8 * matrices["bytes_after"].sum() / matrices["parameters"].sum()
    # Rows of 128 and 256 values: a row's float32 scale is a quarter of a bit at most.
    assert stored == pytest.approx(bits, abs=0.13)


def test_conv1d_and_encoders_reload_too(tmp_path: Path) -> None:
    for family, method in (("gpt2", "nvfp4"), ("bert", "mxfp")):
        loaded = own_model(family, tmp_path / family)
        save(loaded, apply(loaded, method), tmp_path / family / "variant")
        assert_reloads(loaded, tmp_path / family / "variant")
    assert_opens_plain(loaded, tmp_path / "bert/variant")


@pytest.mark.parametrize(
    ("method", "cast", "settings"), [("fp8", False, {"scale": "block"}), ("mxfp", True, {"bits": 4})]
)
def test_experts_that_transformers_reads(
    method: str, cast: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    loaded = own_model("mixtral", tmp_path)
    if cast:
        apply(loaded, "cast")
    result = apply(loaded, method, **settings)
    save(loaded, result, tmp_path / "variant")
    assert_reloads(loaded, tmp_path / "variant")
    experts = result.frame[result.frame["component"] == "experts"]
    assert experts["touched"].all()


@pytest.mark.parametrize(
    ("family", "method", "settings", "message"),
    [
        ("mixtral", "mxfp", {"bits": 4}, "put cast to bfloat16 first"),
        ("mixtral", "mxfp", {"bits": 8}, "does not read mxfp8 .* experts"),
        ("mixtral", "nvfp4", {}, "does not read nvfp4 experts"),
        ("smollm", "fp8", {"head": "bfloat16"}, "set head=embedding"),
    ],
)
def test_what_does_not_reload_is_refused_with_nothing_changed(
    family: str, method: str, settings: dict[str, Any], message: str
) -> None:
    loaded = tiny_model(family)
    with pytest.raises(CannotCompress, match=message):
        apply(loaded, method, **settings)
    assert not loaded.packed


def test_blocks_that_do_not_divide_a_row_are_refused(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    layer = loaded.model.model.layers[0].mlp
    layer.down_proj.weight = torch.nn.Parameter(layer.down_proj.weight[:, :250].contiguous())
    with pytest.raises(
        CannotCompress, match=r"blocks of 32, which do not divide in_features 250 .*choose rtn"
    ):
        apply(loaded, "mxfp")


@pytest.mark.parametrize("method", ["fp8", "mxfp", "nvfp4"])
def test_finer_formats_err_less(method: str, tmp_path: Path) -> None:
    settings = get("compress", method).parse({})
    assert isinstance(settings, FormatSettings)
    frame = apply(own_model("llama", tmp_path), method).frame
    error = frame[frame["component"] == "mlp"]["sqnr_db"].mean()
    # On normal weights: e4m3 about 31 dB, NVFP4 about 20, MXFP4 about 18.
    low, high = {"fp8": (30, 33), "mxfp": (17, 19.5), "nvfp4": (19.5, 21.5)}[method]
    assert low < error < high
