"""Pruned variants: from recipe to a plain reload, alone and before a quantizing step; what is refused, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.compress._pipeline import Compressed, compress
from core.errors import BadInput, CannotCompress
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.recipe import Recipe
from core.registry import get
from core.routing.discover import moe_layers
from core.saving.proof import _probe_inputs
from core.types import Documents, ModelRef, Result, silent
from tests.compress.making import grouped_model, own_model, save
from tests.tiny import CORPUS, MOE

pytestmark = pytest.mark.rotating

TEXT = Documents("corpus", "calibration", CORPUS)
SMALL: dict[str, Any] = {"calibration_tokens": 64, "compare_tokens": 32}


def prune(loaded: LoadedModel, text: Documents = TEXT, **settings: Any) -> Result:
    chosen = get("compress", "prune_experts")
    result: Result = chosen.run(loaded, text, silent, chosen.parse({**SMALL, **settings}))
    return result


def made(loaded: LoadedModel, folder: Path, *steps: tuple[str, dict[str, Any]]) -> Compressed:
    recipe = Recipe.parse({"steps": [{"method": m, "settings": s} for m, s in steps]})
    return compress(loaded, recipe, TEXT, folder, silent)


@pytest.mark.slow
@pytest.mark.parametrize("family", MOE)
def test_pruning_reloads_with_plain_transformers(family: str, tmp_path: Path) -> None:
    loaded = grouped_model(tmp_path / "base") if family == "deepseek_v3" else own_model(family, tmp_path)
    layers = moe_layers(loaded)
    n, k, count = layers[0].n_experts, layers[0].top_k, layers[0].n_groups
    before = loaded.nbytes
    variant = made(loaded, tmp_path / "variant", ("prune_experts", {**SMALL, "count": count}))
    assert variant.proof.passed
    assert variant.proof.max_logit_difference == 0
    assert variant.saved.bytes == pytest.approx(variant.saved.predicted_bytes, rel=0.02)
    assert variant.saved.bytes < before
    # One of n experts is gone, and nothing else of the experts has changed.
    assert variant.proof.share_expert_parameters == pytest.approx(count / n)
    again = open_model(ModelRef(str(tmp_path / "variant")))
    assert (again.anatomy.n_experts, again.anatomy.experts_per_token) == (n - count, k)
    with torch.inference_mode():
        inputs = _probe_inputs(loaded)
        assert torch.equal(again.model(**inputs).logits, loaded.model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_pruning_then_rounding_is_one_recipe(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    base = loaded.nbytes
    steps = (("prune_experts", SMALL), ("rtn", {"bits": 8, "group_size": "64"}))
    variant = made(loaded, tmp_path / "variant", *steps)
    assert variant.proof.passed
    assert variant.saved.bytes == pytest.approx(variant.saved.predicted_bytes, rel=0.02)
    assert variant.saved.bytes < 0.4 * base
    # What was not removed was rounded.
    assert variant.proof.share_expert_parameters == 1.0
    values = {metric.name: metric.value for metric in variant.result.metrics}
    assert values["share_of_expert_parameters_touched"] == 1.0
    assert values["experts_per_layer"] == 3
    assert {"main", "step_1", "step_1_experts", "step_1_layers"} <= set(variant.result.frames)
    assert all(view.frame in variant.result.frames for view in variant.result.views)
    config = json.loads((tmp_path / "variant/config.json").read_text())
    assert 3 in (config.get("num_experts"), config.get("num_local_experts"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("criterion", ["reap", "man", "msan", "ean", "frequency", "aimer", "naee", "random"])
def test_every_criterion_keeps_its_best(criterion: str, tmp_path: Path) -> None:
    loaded = own_model("olmoe", tmp_path)
    result = prune(loaded, criterion=criterion, count=2)
    assert loaded.anatomy.n_experts == 2
    experts = result.frames["experts"]
    assert experts.groupby("layer")["kept"].sum().eq(2).all()
    if criterion != "naee":
        assert (experts["kept"] == (experts["rank"] <= 2)).all()
    layers = result.frames["layers"]
    assert (layers["change_best"] <= layers["change"] + 1e-9).all()
    assert (layers["change_best"] <= layers["change_random"] + 1e-9).all()
    if criterion == "naee":
        assert (layers["change"] == layers["change_best"]).all()


def test_what_the_experts_lost_is_said_for_a_router_that_does_not_renormalise(tmp_path: Path) -> None:
    said = " ".join(prune(own_model("olmoe", tmp_path / "raw"), count=1).notes)
    assert "Not neutral" in said
    assert "p = " in said
    assert "Not neutral" not in " ".join(
        prune(own_model("mixtral", tmp_path / "renormalised"), count=1).notes
    )


def test_a_group_limited_router_loses_equally_or_not_at_all(tmp_path: Path) -> None:
    loaded = grouped_model(tmp_path / "base")
    for settings, message in (({"count": 2}, "a multiple of 4"), ({"count": 12}, "ranked by its best 2")):
        with pytest.raises(BadInput, match=message):
            prune(loaded, **settings)
    result = prune(loaded, share=0.25)
    table = result.frames["experts"]
    assert table.groupby(["layer", table["expert"] // 4])["kept"].sum().eq(3).all()
    assert any("Not neutral: groups are ranked" in note for note in result.notes)
    save(loaded, result, tmp_path / "variant")
    again = open_model(ModelRef(str(tmp_path / "variant")))
    inputs = _probe_inputs(loaded)
    with torch.inference_mode():
        assert torch.equal(again.model(**inputs).logits, loaded.model(**inputs).logits)


def test_experts_that_no_token_reached_are_named_and_go_first(tmp_path: Path) -> None:
    loaded = own_model("gpt_oss", tmp_path)
    for layer in moe_layers(loaded):
        loaded.model.get_submodule(layer.router).bias.data[2] = -1e6
    result = prune(loaded, count=1, compare_tokens=0)
    table = result.frames["experts"]
    assert (table[table["expert"] == 2]["status"] == "removed, never reached").all()
    assert (table[table["expert"] != 2]["status"] == "kept").all()
    values = {metric.name: metric.value for metric in result.metrics}
    assert values["experts_never_reached"] == table["layer"].nunique()
    assert any("reached by no calibration token (0:2" in note for note in result.notes)


def test_protected_experts_stay(tmp_path: Path) -> None:
    result = prune(own_model("olmoe", tmp_path), criterion="frequency", count=2, protect="0:3, 1:3 2:3")
    table = result.frames["experts"]
    assert table[table["expert"] == 3]["status"].str.contains("kept, protected").all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 3}, "keep at least 2"),
        ({"share": 0.1}, "rounds to none"),
        ({"protect": "0-3"}, "layer:expert pairs"),
        ({"protect": "7:0"}, r"MoE layers are \[0, 1, 2\]"),
        ({"count": 2, "protect": "0:0 0:1 0:2"}, "protects 3 experts but would keep 2"),
        ({"criterion": "naee", "count": 2, "protect": "0:0 0:1 0:2"}, "no set of 2 experts"),
    ],
)
def test_what_cannot_be_is_refused_with_nothing_changed(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    loaded = own_model("olmoe", tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    with pytest.raises((BadInput, CannotCompress), match=message):
        prune(loaded, **settings)
    assert loaded.anatomy.n_experts == 4
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())


def test_a_dense_model_is_refused_by_the_recipe_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="needs moe"):
        made(own_model("llama", tmp_path), tmp_path / "out/variant", ("prune_experts", SMALL))
    assert not (tmp_path / "out").exists()


def test_quantizing_comes_last(tmp_path: Path) -> None:
    with pytest.raises(CannotCompress, match="quantize last"):
        made(own_model("olmoe", tmp_path), tmp_path / "out/variant", ("rtn", {}), ("prune_experts", SMALL))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_fewer_experts_per_token_reload_in_the_same_bytes(tmp_path: Path) -> None:
    loaded = own_model("qwen3_moe", tmp_path)
    size = (tmp_path / "base/model.safetensors").stat().st_size
    variant = made(loaded, tmp_path / "variant", ("reduce_top_k", {"top_k": 1}))
    assert variant.proof.passed
    assert variant.saved.bytes == pytest.approx(size, rel=0.01)
    assert (variant.proof.share_parameters, variant.proof.share_expert_parameters) == (0, 0)
    assert open_model(ModelRef(str(tmp_path / "variant"))).anatomy.experts_per_token == 1
    values = {metric.name: metric.value for metric in variant.result.metrics}
    one = 3 * 64 * 128 * 2  # gate, up, down of one expert in each of two MoE layers
    assert values["active_parameters_before"] - values["active_parameters"] == one
