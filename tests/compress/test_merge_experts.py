"""Merging experts in a model: what is lossless is so to rounding, what is not says so, and every family reloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from core.compress import merge_experts
from core.compress._pipeline import compress
from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.recipe import Recipe
from core.registry import get
from core.routing.alignment import reordered
from core.routing.discover import moe_layers
from core.routing.lens import Change, routed
from core.routing.merging_profile import read_profile
from core.routing.surgery import read_expert, write_expert
from core.saving.proof import _probe_inputs
from core.types import Documents, Result, silent
from tests.compress.making import own_model
from tests.tiny import CORPUS, MOE, tiny_model

pytestmark = pytest.mark.rotating

TEXT = Documents("corpus", "calibration", tuple(text * 3 for text in CORPUS))
SCHEMES = ("ream", "hc_smoe")


def merge(loaded: LoadedModel, **settings: object) -> Result:
    chosen = get("compress", "merge_experts")
    with loaded.lock, torch.inference_mode():
        result: Result = chosen.run(
            loaded, TEXT, silent, chosen.parse({"calibration_tokens": 128, **settings})
        )
    return result


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = loaded.model(**_probe_inputs(loaded)).logits
    return found


def with_duplicates(family: str, folder: Path) -> LoadedModel:
    """Expert 1 of every layer does what expert 0 does, its neurons in another order; its router row is its own."""
    loaded = own_model(family, folder)
    for layer in moe_layers(loaded):
        original = read_expert(loaded, layer.layer, 0)
        order_I = np.random.default_rng(layer.layer).permutation(len(original.up_ID))
        write_expert(loaded, layer.layer, 1, reordered(original, order_I))
    return loaded


def smallest_share(loaded: LoadedModel) -> float:
    """One expert of every router group."""
    layer = moe_layers(loaded)[0]
    return layer.n_groups / layer.n_experts


@pytest.mark.parametrize("family", MOE)
def test_duplicates_merge_without_loss_through_a_map_and_not_in_a_plain_checkpoint(
    family: str, tmp_path: Path
) -> None:
    loaded = with_duplicates(family, tmp_path)
    before = logits(loaded)
    layers = moe_layers(loaded)
    originals = {layer.layer: read_expert(loaded, layer.layer, 0) for layer in layers}
    result = merge(loaded, scheme="hc_smoe", share=smallest_share(loaded))
    groups = result.frames["groups"].set_index(["layer", "expert"])
    maps = {}
    for layer in layers:
        pair = groups.loc[layer.layer].loc[[0, 1], "becomes"]
        assert pair[0] == pair[1], "equal outputs are the nearest"
        kept = sorted(groups.loc[layer.layer, "becomes"].unique())
        now = read_expert(loaded, layer.layer, kept.index(pair[0]))
        # The merged expert is the original up to the order of its neurons.
        sorted_down_DI = originals[layer.layer].down_DI.sort(-1).values
        assert torch.equal(now.down_DI.sort(-1).values, sorted_down_DI)
        maps[layer.layer] = torch.tensor([pair[0] if e in (0, 1) else e for e in range(layer.n_experts)])
    full = with_duplicates(family, tmp_path / "full")
    with torch.inference_mode(), routed(full, change=Change(expert_map=maps)):
        through_map = full.model(**_probe_inputs(full)).logits
    assert torch.allclose(through_map, before, rtol=1e-4, atol=1e-5)
    plain = float((logits(loaded) - before).abs().max())
    assert plain > 1e-3, "fewer router rows are not lossless even for duplicates"
    sharing = {m.name: m.value for m in result.metrics}["tokens_sharing_a_group"]
    assert 0 < sharing <= 1
    assert f"{sharing:.1%} of the calibration tokens chose two" in result.notes[0]
    loses_mass = layers[0].rule in ("softmax_topk", "softmax_group_topk")
    assert ("softmax over all experts loses" in result.notes[0]) == loses_mass


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", MOE)
def test_every_family_is_merged_and_accounted_for(family: str, scheme: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    n = moe_layers(loaded)[0].n_experts
    result = merge(loaded, scheme=scheme, share=smallest_share(loaded))
    layers = moe_layers(loaded)
    left = n - layers[0].n_groups
    assert {layer.n_experts for layer in layers} == {left}
    groups = result.frames["groups"]
    assert (groups.groupby("layer").size() == n).all()
    assert (groups.groupby("layer")["becomes"].nunique() == left).all()
    assert np.allclose(groups.groupby(["layer", "becomes"])["share"].sum(), 1)
    single = groups["group_size"] == 1
    assert (groups.loc[single, "output_change"] == 0).all()
    assert (groups.loc[~single, "output_change"] > 1e-3).any()
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_ream_reads_a_layer_with_the_layers_before_it_merged(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = own_model("olmoe", tmp_path)
    first = moe_layers(loaded)[0]
    seen = []

    def reading(loaded, layer, texts, progress):  # type: ignore[no-untyped-def]
        seen.append((layer.layer, len(loaded.model.get_submodule(first.router).weight)))
        return read_profile(loaded, layer, texts, progress)

    monkeypatch.setattr(merge_experts, "read_profile", reading)
    merge(loaded, scheme=scheme)
    assert seen == [(0, 4), (1, 3 if scheme == "ream" else 4), (2, 3 if scheme == "ream" else 4)]


def test_the_profile_is_what_the_slow_sums_give() -> None:
    loaded = tiny_model("olmoe")
    layer = moe_layers(loaded)[1]
    texts = [loaded.tokenizer(text)["input_ids"] for text in CORPUS[:2]]
    rows = []
    with torch.inference_mode():
        found = read_profile(loaded, layer, texts, silent)
        for ids in texts:
            with routed(loaded, rows.append):
                loaded.model(torch.tensor([ids]))
    rows = [row for row in rows if row.layer == layer.layer]
    load_E, gated_E, sums_ED = np.zeros(4), np.zeros(4), np.zeros((4, loaded.anatomy.d_model))
    n = 0
    for row in rows:
        for x_D, chosen_K, weights_K in zip(row.hidden_TD, row.experts_TK, row.weights_TK, strict=True):
            n += 1
            for e in range(4):
                w = read_expert(loaded, layer.layer, e)
                out_D = w.down_DI @ (torch.nn.functional.silu(w.gate_ID @ x_D) * (w.up_ID @ x_D))
                sums_ED[e] += out_D.double().numpy()
                for chosen, weight in zip(chosen_K, weights_K, strict=True):
                    if chosen == e:
                        load_E[e] += 1
                        gated_E[e] += float(weight * out_D.norm())
    assert np.array_equal(found.load_E, load_E)
    assert np.allclose(found.saliency_E, gated_E / load_E, rtol=1e-4)
    assert np.allclose(found.mean_ED, sums_ED / n, atol=1e-6)
    logits_TE = torch.cat([row.logits_TE for row in rows])
    assert np.allclose(found.logit_cosine_EE, np.corrcoef(logits_TE.numpy().T), atol=1e-5)
    assert len(found.experts_TK) == n


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", MOE)
def test_a_merged_model_reloads_with_plain_transformers(family: str, scheme: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    share = smallest_share(loaded)
    recipe = Recipe.of("merge_experts", scheme=scheme, share=share, calibration_tokens=128)
    made = compress(loaded, recipe, TEXT, tmp_path / "variant", silent)
    assert made.proof.passed
    assert made.proof.max_logit_difference == 0
    sizes = {m.name: m.value for m in made.result.metrics}
    assert made.saved.bytes < sizes["bytes_before"]
    assert {"main", "groups", "layers"} <= set(made.result.frames)


def test_the_table_says_what_is_gone_and_what_changed(tmp_path: Path) -> None:
    loaded = own_model("olmoe", tmp_path)
    frame = merge(loaded, share=0.25).frame
    experts = frame[frame["component"] == "experts"]
    assert (experts["parameters"] * 4 == experts["parameters_before"] * 3).all()
    # Of each tensor one expert is gone and one is an average: half of what was there.
    assert (experts["parameters_touched"] * 2 == experts["parameters_before"]).all()
    kept = frame[~frame["component"].isin(["experts", "router"])]
    assert not kept["touched"].any()
    assert isinstance(frame, pd.DataFrame)


def test_refusals_come_before_any_change(tmp_path: Path) -> None:
    loaded = own_model("olmoe", tmp_path)
    before = logits(loaded)
    with pytest.raises(BadInput, match="would keep 1 experts but routes each token to 2; keep at least 2"):
        merge(loaded, share=0.75)
    short = Documents("nothing", "calibration", ("a",))
    chosen = get("compress", "merge_experts")
    with pytest.raises(BadInput, match="nothing has no document of 8 tokens; give longer calibration text"):
        chosen.run(loaded, short, silent, chosen.parse({}))
    assert torch.equal(logits(loaded), before)
