"""Experts stored in two forms: the choice is the best there is, the bytes are real, and plain transformers reads them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from core.compress._pipeline import compress
from core.compress.expert_bits import finer
from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.numerics.integer import quantize
from core.numerics.packed import PackedExperts, narrow_rows
from core.numerics.schemes import FloatScheme, IntegerScheme
from core.recipe import Recipe
from core.registry import get
from core.types import Documents, Result, silent
from tests.compress.making import own_model
from tests.tiny import CORPUS

pytestmark = pytest.mark.rotating

TEXT = Documents("corpus", "calibration", tuple((text + "\n") * 6 for text in CORPUS))
ONE_BY_ONE = ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "deepseek_v3", "jamba")
AS_ONE_TENSOR = ("gpt_oss", "granitemoe")


def store(loaded: LoadedModel, **settings: object) -> Result:
    chosen = get("compress", "expert_bits")
    with loaded.lock, torch.inference_mode():
        result: Result = chosen.run(
            loaded, TEXT, silent, chosen.parse({"calibration_tokens": 128, **settings})
        )
    return result


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 1])
def test_no_other_choice_of_as_many_experts_gains_more(share: float) -> None:
    gain_LE = np.random.default_rng(1).random((2, 5))
    fine_LE = finer(gain_LE, share)
    n = round(share * 10)
    assert fine_LE.sum() == n
    best = max((gain_LE.ravel()[list(some)].sum() for some in combinations(range(10), n)), default=0.0)
    assert gain_LE[fine_LE].sum() == pytest.approx(best)


@pytest.mark.parametrize("form", ["int4", "int2", "float8"])
def test_every_expert_is_touched_and_every_router_kept(form: str, tmp_path: Path) -> None:
    loaded = own_model("olmoe", tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    result = store(loaded, format=form)
    frame = result.frame.set_index("component")
    metrics = {m.name: m.value for m in result.metrics}
    assert metrics["share_of_expert_parameters_touched"] == 1.0
    assert frame.loc["experts", "touched"].all()
    assert not frame.drop("experts")["touched"].any()
    assert (frame.loc["router", "bits"] >= 8).all()
    assert "Routers stay at 32 bits." in result.notes
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".experts." not in name), name
    assert result.frames["experts"]["form"].eq("fine").sum() == 3
    assert metrics["experts_finer"] == 3


def test_each_expert_is_in_the_form_that_was_chosen(tmp_path: Path) -> None:
    loaded = own_model("olmoe", tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    experts = store(loaded, format="int3", share=0.5).frames["experts"].set_index(["layer", "expert"])
    schemes = {"coarse": IntegerScheme(3, None, True), "fine": IntegerScheme(3, 32, True)}
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        for expert in range(4):
            scheme = schemes[experts.loc[(layer, expert), "form"]]
            slow = quantize(before[name][expert], scheme, scale_dtype=torch.float32).dequantize()
            assert torch.equal(loaded.model.get_parameter(name)[expert], slow)


def test_the_finer_form_goes_where_routing_goes(tmp_path: Path) -> None:
    experts = store(own_model("olmoe", tmp_path), importance="load", share=0.5).frames["experts"]
    assert (experts["error_fine"] < experts["error_coarse"]).all()
    fine = experts["form"] == "fine"
    assert experts.loc[fine, "gain"].min() >= experts.loc[~fine, "gain"].max()
    assert experts.loc[fine, "load"].mean() > experts.loc[~fine, "load"].mean()
    errors = {}
    for importance in ("load", "none"):
        result = store(own_model("olmoe", tmp_path / importance), importance=importance, share=0.5)
        frame = result.frames["experts"]
        used = np.where(frame["form"] == "fine", frame["error_fine"], frame["error_coarse"])
        errors[importance] = (used * experts["load"]).sum()
    assert errors["load"] < errors["none"]


def test_float8_rows_use_the_whole_range_and_zero_rows_stay_zero() -> None:
    weight_RC = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)) * 1e-4
    weight_RC[2] = 0
    packed = narrow_rows(weight_RC, FloatScheme("float8_e4m3fn"))
    error = (packed.dequantize() - weight_RC).norm() / weight_RC.norm()
    # Three bits of mantissa: at most 1/16 relative, about 1/40 on average.
    assert error < 0.03
    assert torch.equal(packed.dequantize()[2], torch.zeros(32))
    unscaled = weight_RC.to(torch.float8_e4m3fn).float()
    assert (unscaled - weight_RC).norm() / weight_RC.norm() > 0.9, "without scales such weights are lost"


def test_stored_bytes_are_the_sum_over_experts() -> None:
    weight_ERC = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(0))
    forms = tuple(
        quantize(weight_ERC, IntegerScheme(4, g, True), scale_dtype=torch.float32) for g in (None, 32)
    )
    # 32 bytes of codes per row, 16 bytes of shape per expert; one or two scales of 4 bytes per row.
    for choice_E, scales in (((0, 0, 0), 3), ((1, 1, 1), 6), ((0, 1, 0), 4)):
        packed = PackedExperts(forms, choice_E)
        assert packed.stored_bytes == 3 * (8 * 32 + 16) + scales * 8 * 4


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int4", "int3", "int2", "float8"])
@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_plain_transformers_reads_both_forms(family: str, form: str, tmp_path: Path) -> None:
    steps = [
        {"method": "cast"},
        {"method": "expert_bits", "settings": {"format": form, "calibration_tokens": 128}},
    ]
    recipe = Recipe.parse({"steps": steps})
    made = compress(own_model(family, tmp_path), recipe, TEXT, tmp_path / "variant", silent)
    assert made.proof.passed
    assert (made.proof.max_logit_difference, made.proof.differing_parameters) == (0.0, 0)
    assert made.proof.share_expert_parameters == 1.0
    assert made.saved.bytes == pytest.approx(made.saved.predicted_bytes, rel=0.005)
    with safe_open(tmp_path / "variant/model.safetensors", "pt") as file:
        stored = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    of_experts = [(name, t) for name, t in stored if ".experts." in name]
    if form == "float8":
        kinds = {tensor.dtype for name, tensor in of_experts if name.endswith(".weight")}
        assert kinds == {torch.float8_e4m3fn, torch.bfloat16}
    else:
        per_row = {tensor.shape[1] == 1 for name, tensor in of_experts if name.endswith("_scale")}
        assert per_row == {True, False}


@pytest.mark.parametrize("family", AS_ONE_TENSOR)
def test_families_whose_files_hold_experts_as_one_tensor_are_refused(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    with pytest.raises(CannotCompress, match="stores all experts of a layer as one tensor"):
        store(loaded)
    assert not loaded.packed


def test_a_group_that_does_not_divide_and_a_second_quantization_are_refused(tmp_path: Path) -> None:
    loaded = own_model("qwen3_moe", tmp_path)  # experts of 64
    with pytest.raises(
        CannotCompress, match=r"group_size 128 does not divide in_features 64 .* choose 16, 32, 64"
    ):
        store(loaded, group_size="128")
    store(loaded)
    with pytest.raises(CannotCompress):
        store(loaded)
