"""Neurons dealt out to experts: all of them are the dense model, some of them exactly those that were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.capture import capture
from core.compress import _dealing
from core.compress._pipeline import compress
from core.errors import BadSettings, CannotCompress
from core.models.loaded import LoadedModel
from core.recipe import Recipe
from core.registry import get
from core.train._residuals import cut_text
from core.types import Documents, Result, silent
from tests.compress.making import own_model
from tests.tiny import CORPUS, D_FF

pytestmark = pytest.mark.rotating

OFFERED = ("llama", "mistral", "qwen2", "qwen3")
TEXT = Documents("corpus", "calibration", CORPUS)
EXACT = 1e-6


def moefy(loaded: LoadedModel, **settings: Any) -> Result:
    chosen = get("compress", "moefy")
    result: Result = chosen.run(loaded, TEXT, silent, chosen.parse({"max_tokens": 128, **settings}))
    return result


def logits(loaded: LoadedModel) -> torch.Tensor:
    ids = torch.randint(512, (2, 96), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output: torch.Tensor = loaded.model(input_ids=ids).logits
    return output


def gap(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("cluster_by", ["activations", "weights"])
@pytest.mark.parametrize("family", OFFERED)
def test_with_every_expert_chosen_it_is_the_dense_model(family: str, cluster_by: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    before = logits(loaded)
    result = moefy(loaded, experts=8, top_k=8, cluster_by=cluster_by)
    assert gap(before, logits(loaded)) <= EXACT
    metrics = {metric.name: metric.value for metric in result.metrics}
    assert metrics["missing_of_mlp_output"] == 0
    assert metrics["router_recall"] == 1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_fewer_it_is_the_sum_of_the_chosen_neurons_with_weight_one(family: str, tmp_path: Path) -> None:
    """Slow reference: the dense weights' own neurons, those of the chosen experts alone, token by token."""
    loaded = own_model(family, tmp_path)
    dense = [layer.mlp for layer in loaded.model.model.layers]
    result = moefy(loaded, experts=4, top_k=3)
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap <= 2 * EXACT
    block = loaded.anatomy.blocks[1]
    assert block.mlp
    assert block.experts
    with (
        capture(loaded.model, [block.mlp], inputs=True) as read,
        capture(loaded.model, [block.mlp]) as given,
        capture(loaded.model, [block.experts], inputs=True, item=1) as chosen,
        capture(loaded.model, [block.experts], inputs=True, item=2) as weights,
    ):
        logits(loaded)
    torch.testing.assert_close(
        weights[block.experts], torch.full_like(weights[block.experts], 1 / 3), rtol=2e-3, atol=0
    )
    experts = loaded.model.get_submodule(block.experts)
    gate = dense[1].gate_proj.weight
    place = [
        [int((gate == row).all(1).nonzero()) for row in experts.gate_up_proj[e, : D_FF // 4]]
        for e in range(4)
    ]
    assert sorted(neuron for expert in place for neuron in expert) == list(
        range(D_FF)
    )  # every neuron in one expert
    tokens, wanted = read[block.mlp].flatten(0, 1), []
    for token, those in zip(tokens[:20], chosen[block.experts][:20].tolist(), strict=True):
        mask = torch.zeros(D_FF)
        for expert in those:
            mask[place[expert]] = 1
        active = torch.nn.functional.silu(dense[1].gate_proj(token)) * dense[1].up_proj(token) * mask
        wanted.append(dense[1].down_proj(active))
    assert gap(torch.stack(wanted), given[block.mlp].flatten(0, 1)[:20]) < 1e-3


def test_what_is_missing_is_measured_as_the_slow_way_says(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    parts = cut_text(loaded, TEXT, window=64, max_tokens=150)
    clusters = _dealing.by_gate_rows(loaded, 4, seed=0)
    with torch.inference_mode():
        routers = _dealing.fit_routers(loaded, parts.training, clusters, 4, spread=1.0, progress=silent)
        found = _dealing.measure(loaded, parts.held_out, clusters, routers, top_k=2, seed=0, progress=silent)
    mlp, power, missing, hits, n = loaded.model.model.layers[0].mlp, 0.0, 0.0, 0, 0
    for window in parts.held_out:
        with torch.no_grad(), capture(loaded.model, ["model.layers.0.mlp"], inputs=True) as read:
            loaded.model(input_ids=torch.tensor([window.ids]))
        for token in read["model.layers.0.mlp"][0]:
            active = torch.nn.functional.silu(mlp.gate_proj(token)) * mlp.up_proj(token)
            outputs = [mlp.down_proj(active * (clusters[0] == expert)) for expert in range(4)]
            scores = [float(row.float() @ token) for row in routers[0]]
            norms = [float(output.norm()) for output in outputs]
            chosen, best = (set(sorted(range(4), key=lambda e: -by[e])[:2]) for by in (scores, norms))
            power += float(sum(outputs).square().sum())
            missing += float(sum(outputs[e] for e in range(4) if e not in chosen).square().sum())
            hits += len(chosen & best)
            n += 2
    line = found[(found["layer"] == 0) & (found["chosen_by"] == "router")].iloc[0]
    assert line["relative_error"] == pytest.approx((missing / power) ** 0.5, rel=1e-4)
    assert line["recall"] == pytest.approx(hits / n)


def test_the_fitted_router_beats_chance_and_not_the_true_norms(tmp_path: Path) -> None:
    layers = moefy(own_model("smollm", tmp_path), experts=8, top_k=4).frames["layers"]
    mean = layers.groupby("chosen_by")[["relative_error", "recall"]].mean()
    assert mean.loc["true norms", "relative_error"] < mean.loc["router", "relative_error"]
    assert mean.loc["router", "relative_error"] < mean.loc["chance", "relative_error"]
    assert mean.loc["true norms", "recall"] == 1
    assert mean.loc["router", "recall"] > mean.loc["chance", "recall"]


@pytest.mark.slow
@pytest.mark.parametrize("family", OFFERED)
def test_it_reloads_with_plain_transformers(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    made = compress(
        loaded, Recipe.of("moefy", experts=4, top_k=2, max_tokens=128), TEXT, tmp_path / "out", silent
    )
    assert made.proof.passed
    assert made.proof.max_logit_difference == 0
    assert made.saved.bytes == pytest.approx(made.saved.predicted_bytes, rel=1e-3)


def test_each_token_uses_less_and_the_file_is_as_large(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    result = moefy(loaded, experts=4, top_k=1)
    metrics = {metric.name: metric.value for metric in result.metrics}
    assert metrics["active_parameters"] < metrics["active_parameters_before"]
    assert metrics["size_ratio"] == pytest.approx(1, abs=0.01)
    assert any("training" in note for note in result.notes)


def test_what_does_not_divide_is_refused_with_choices(tmp_path: Path) -> None:
    loaded = own_model("llama", tmp_path)
    with pytest.raises(
        CannotCompress, match=r"experts=6 does not divide the 256 neurons .* choose 2, 4, 8, 16"
    ):
        moefy(loaded, experts=6, top_k=2)
    with pytest.raises(BadSettings, match="cannot be routed to 9 of 8 experts"):
        get("compress", "moefy").parse({"experts": 8, "top_k": 9})
    with pytest.raises(CannotCompress, match="like Gemma2ForCausalLM"):
        moefy(own_model("gemma2", tmp_path / "gemma2"))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
