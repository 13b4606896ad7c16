"""Routing drift: nothing between a model and itself, the split by replay against hooks, damage found where it was done."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import BadInput
from core.models.loaded import LoadedModel
from core.probes.routing_drift import RoutingDriftSettings, routing_drift
from core.routing.kept import RECORD, kept_experts, kept_record
from core.routing.surgery import keep_experts
from core.types import Prompt, Result, silent
from tests.compress.making import apply, own_model
from tests.references import slow_rerouting
from tests.tiny import MOE, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")


def drift(variant: LoadedModel, original: LoadedModel, **settings: object) -> Result:
    return routing_drift(variant, original, PROMPT, silent, RoutingDriftSettings(**settings))


def values(result: Result) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


def quantized(family: str, folder: Path, bits: int) -> LoadedModel:
    loaded = own_model(family, folder)
    apply(loaded, "rtn", bits=bits, group_size="channel")
    return loaded


@pytest.mark.parametrize("family", MOE)
def test_a_model_does_not_drift_from_itself(family: str) -> None:
    loaded = tiny_model(family)
    result = drift(loaded, loaded)
    found = values(result)
    assert found == {
        "delta_loss": 0,
        "weight_error": 0,
        "routing_error": 0,
        "overlap": 1,
        "harmful_share": 0,
    }
    assert (result.frames["layers"]["weight_drift"] == 0).all()
    assert result.frames["moved"].empty
    assert result.provenance.exactness_gap == 0


@pytest.mark.parametrize("family", MOE)
def test_the_split_is_the_replay_by_hand_and_adds_up(family: str, tmp_path: Path) -> None:
    original, variant = tiny_model(family), quantized(family, tmp_path, 3)
    ids = original.tokenizer(PROMPT.text)["input_ids"]
    result = drift(variant, original)
    assert result.provenance.exactness_gap == 0, "a model that replays its own routing is unchanged"
    recorded = slow_rerouting.decisions(original, ids)
    base = slow_rerouting.nats(original, ids)
    own = slow_rerouting.nats(variant, ids)
    forced = slow_rerouting.nats(variant, ids, lambda at, experts, weights: recorded[at])
    tokens = result.frames["tokens"].iloc[:-1]
    np.testing.assert_allclose(tokens["weight_nats"], forced - base, atol=2e-5)
    np.testing.assert_allclose(tokens["routing_nats"], own - forced, atol=2e-5)
    np.testing.assert_allclose(
        tokens["delta_nats"], tokens["weight_nats"] + tokens["routing_nats"], atol=1e-12
    )
    found = values(result)
    assert found["delta_loss"] == pytest.approx(found["weight_error"] + found["routing_error"], abs=1e-12)
    other = slow_rerouting.decisions(variant, ids)
    for row in result.frames["layers"].itertuples():
        a_TK, b_TK = recorded[row.layer][0], other[row.layer][0]
        shares = [len(set(a) & set(b)) / len(a) for a, b in zip(a_TK.tolist(), b_TK.tolist(), strict=True)]
        assert row.overlap == pytest.approx(np.mean(shares))
    shown = result.frames["layers"].sort_values("overlap", kind="stable").iloc[0]
    slots = recorded[int(shown["layer"])][0].numel()
    assert result.frames["moved"]["moved"].sum() == pytest.approx(slots * (1 - shown["overlap"]))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss", "deepseek_v3"])
def test_damage_is_blamed_on_what_was_damaged(family: str, tmp_path: Path) -> None:
    """A changed router is all routing error; changed experts of the last layer route as before."""
    original = tiny_model(family)
    rerouted, reweighed = own_model(family, tmp_path / "a"), own_model(family, tmp_path / "b")
    last = original.anatomy.blocks[-1]
    with torch.no_grad():
        router = rerouted.model.get_submodule(last.router).weight
        router.copy_(router.flip(0))
        reweighed.model.get_submodule(last.experts).down_proj.mul_(0.5)
    found = values(drift(rerouted, original))
    assert found["weight_error"] == 0
    assert found["routing_error"] != 0
    assert found["overlap"] < 1
    found = values(drift(reweighed, original))
    assert found["routing_error"] == 0
    assert found["weight_error"] != 0
    assert found["overlap"] == 1


def test_fewer_bits_drift_further_on_average(tmp_path: Path) -> None:
    overlaps = []
    for bits in (8, 4, 3, 2):
        of_family = [
            values(
                drift(
                    quantized(family, tmp_path / f"{family}{bits}", bits),
                    tiny_model(family),
                    text="domains",
                    max_tokens=256,
                )
            )["overlap"]
            for family in ("mixtral", "olmoe", "granitemoe")
        ]
        overlaps.append(float(np.mean(of_family)))
    assert (np.diff(overlaps) < 0).all(), overlaps
    assert overlaps[0] > 0.97


def pruned(family: str, folder: Path, kept: list[int]) -> LoadedModel:
    loaded = own_model(family, folder)
    layers = [block.index for block in loaded.anatomy.blocks if block.is_moe]
    keep_experts(loaded, dict.fromkeys(layers, kept))
    record = {"steps": [{"conditions": kept_record(dict.fromkeys(layers, kept))}]}
    (loaded.folder / RECORD).write_text(json.dumps(record))
    return loaded


def test_a_pruned_variant_is_read_by_its_originals_numbers(tmp_path: Path) -> None:
    """Experts in another order are no drift; one less is a drift of the slots that had it."""
    original = tiny_model("mixtral")
    turned = values(drift(pruned("mixtral", tmp_path / "a", [2, 0, 3, 1]), original))
    assert turned["overlap"] == 1
    assert turned["delta_loss"] == pytest.approx(0, abs=1e-6)
    smaller = pruned("mixtral", tmp_path / "b", [3, 0, 2])
    result = drift(smaller, original)
    assert any("kept 3 of 4 experts" in note for note in result.notes)
    cells = result.frames["main"]
    first = cells[cells["layer"] == 0]  # what its router reads is untouched
    had = first["experts_original"].str.contains("1")
    assert ((first["overlap"] < 1) == had).all()
    assert not cells["experts_variant"].str.contains("1").any()
    (smaller.folder / RECORD).unlink()
    with pytest.raises(BadInput, match="do not say which were kept"):
        drift(smaller, original)


def test_a_second_pruning_counts_in_what_the_first_left(tmp_path: Path) -> None:
    steps = [
        {"conditions": kept_record({0: [7, 1, 4]})},
        {"conditions": {}},
        {"conditions": kept_record({0: [2, 0]})},
    ]
    (tmp_path / RECORD).write_text(json.dumps({"steps": steps}))
    assert kept_experts(tmp_path) == {0: (4, 7)}
    assert kept_experts(tmp_path / "nowhere") is None


def test_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(BadInput, match="is dense"):
        drift(tiny_model("mixtral"), tiny_model("llama"))
    with pytest.raises(BadInput, match="route in different layers"):
        drift(tiny_model("qwen3_moe"), tiny_model("mixtral"))
