"""What every step on integer grids shares: old recipes keep their meaning, sizes are promised as stored, odd bits reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import CannotCompress
from core.models.open import open_model
from core.models.targets import targets
from core.numerics.schemes import FloatScheme, IntegerScheme
from core.quantize.grid import GridSettings, assign, bits_per_value, put, rounded
from core.recipe import Recipe
from core.types import ModelRef
from tests.compress.making import apply, own_model, save
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("settings", "variant"),
    [
        ({}, "e51bc99ec2cf"),
        ({"bits": 8, "group_size": "channel", "scheme": "symmetric"}, "7ed88757cd3f"),
        ({"bits": 3, "embedding_bits": 16, "head_bits": 8}, "30bfe0bc3131"),
    ],
)
def test_recipes_written_before_keep_their_ids(settings: dict[str, object], variant: str) -> None:
    recipe = Recipe.of("rtn", **settings)
    assert recipe.variant_id("f" * 64) == variant


def test_the_canonical_json_of_the_default_is_as_it_was() -> None:
    assert Recipe.of("rtn").canonical() == (
        '{"schema_version":1,"steps":[{"method":"rtn","settings":{"bits":4,"embedding_bits":8,"group_size":"32",'
        '"head_bits":"embedding","scheme":"affine"}}]}'
    )


@pytest.mark.parametrize("bits", [5, 7])
def test_odd_bits_reload_bit_for_bit(bits: int, tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    saved = save(loaded, apply(loaded, "rtn", bits=bits), tmp_path / "variant")
    again = open_model(ModelRef(str(tmp_path / "variant")))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name
    assert saved.bytes == pytest.approx(saved.predicted_bytes, rel=0.02)


@pytest.mark.parametrize("family", ["llama", "smollm", "mixtral"])
def test_bits_promised_are_bits_stored(family: str, tmp_path: Path) -> None:
    settings = GridSettings(bits=4, embedding_bits=16)
    loaded = own_model(family, tmp_path)
    promised = settings.stored_bits(loaded.anatomy)
    frame = apply(loaded, "rtn", **settings.model_dump()).frame
    for component, lines in frame[frame["touched"]].groupby("component"):
        stored = 8 * lines["bytes_after"].sum() / lines["parameters"].sum()
        # Beside its codes and scales a matrix stores its shape, 16 bytes.
        assert stored == pytest.approx(
            promised[component] + 128 * len(lines) / lines["parameters"].sum(), rel=0.02
        )


def test_bits_per_value_by_hand() -> None:
    assert bits_per_value(IntegerScheme(4, 32, symmetric=False), 999) == 4 + (16 + 4) / 32
    assert bits_per_value(IntegerScheme(3, None, symmetric=True), 64) == 3 + 16 / 64
    assert bits_per_value(FloatScheme("bfloat16"), 64) == 16


def test_what_does_not_apply_is_refused_with_nothing_changed() -> None:
    loaded = tiny_model("qwen3_moe")
    with pytest.raises(CannotCompress, match=r"does not divide in_features 64 of .*experts"):
        assign(loaded, GridSettings(group_size="128"))
    with pytest.raises(CannotCompress, match="choose embedding_bits=4"):
        assign(loaded, GridSettings(bits=4, embedding_bits=5))
    with pytest.raises(CannotCompress, match="choose embedding_bits=4"):
        GridSettings(bits=4, embedding_bits=5).stored_bits(loaded.anatomy)
    assert not loaded.packed


def test_a_weight_that_was_changed_but_not_packed_says_so(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    norm = next(t for t in targets(loaded) if t.component == "norm")
    parameter = loaded.model.get_parameter(norm.name)
    before = parameter.data.clone()
    assert put(loaded, norm, None, before)["touched"] is False
    parameter.data = 2 * before
    line = put(loaded, norm, None, before)
    assert (line["touched"], line["reason"], line["bits"]) == (True, "", 32)
    assert line["relative_error"] == pytest.approx(1.0)


def test_errors_are_against_what_the_step_found(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    target = next(t for t in targets(loaded) if t.layout == "linear")
    parameter = loaded.model.get_parameter(target.name)
    before = parameter.data.clone()
    parameter.data = before * 0.5
    packed = rounded(target, parameter.data, IntegerScheme(8, None, symmetric=True))
    line = put(loaded, target, packed, before)
    assert line["relative_error"] == pytest.approx(0.5, abs=0.01)
    assert torch.equal(parameter.data, packed.dequantize().to(before.dtype))
    assert loaded.packed == {target.module: packed}
