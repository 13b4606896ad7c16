"""Calibration coverage: counts that add up, how many tokens are missing, and experts that nothing reached."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from core.models.loaded import LoadedModel
from core.probes._coverage import coverage, needed
from core.registry import get
from core.routing.discover import moe_layers
from core.types import Prompt, Result, silent
from tests.compress.making import own_model
from tests.tiny import tiny_model


def report(loaded: LoadedModel, text: Path, **settings: object) -> Result:
    probe = get("probe", "calibration_coverage")
    parsed = probe.parse({"text": str(text), "max_tokens": 400, **settings})
    result: Result = probe.run(loaded, Prompt("unread"), silent, parsed)
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl"
    words = ("one", "two", "go", "def", "Paris", "water")
    lines = [json.dumps({"text": " ".join(f"{word} {i}" for i in range(120))}) for word in words]
    path.write_text("\n".join(lines))
    return path


def test_needs_are_the_missing_tokens_at_the_rate_seen() -> None:
    load = np.array([[300, 100, 1, 0]])
    assert needed(load, load, 1000, 200).tolist() == [[0, 1000, 199_000, 66_667]]
    # At the rate of another text that reaches it twice as often, half as many.
    assert needed(np.array([100]), np.array([80]), 400, 200).tolist() == [500]


def test_the_best_text_is_where_an_expert_is_reached_most() -> None:
    load_DLE = np.array([[[10, 0, 4]], [[5, 0, 30]]])
    table = coverage(load_DLE, np.array([100, 100]), ["prose", "python"], (2,), 20)
    assert table["tokens"].tolist() == [15, 0, 34]
    assert table["best_text"].tolist() == ["prose", "", "python"]
    assert table["verdict"].tolist() == ["too few", "never reached", "covered"]
    assert table["needs_of_best_text"].tolist()[0] == 50  # 5 more at 10 of 100


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_counts_of_a_layer_are_tokens_times_k(family: str, text: Path) -> None:
    loaded = tiny_model(family)
    result = report(loaded, text)
    sums = result.frame.groupby("layer")["tokens"].sum()
    assert sums.nunique() == 1
    assert list(sums.index) == [layer.layer for layer in moe_layers(loaded)]
    assert result.provenance.exactness_gap == 0
    assert sums.iloc[0] == 2 * result.provenance.conditions["tokens"]


def test_an_expert_that_no_token_reaches_is_named_before_any_pruning(text: Path, tmp_path: Path) -> None:
    loaded = own_model("gpt_oss", tmp_path)
    layer = moe_layers(loaded)[1]
    loaded.model.get_submodule(layer.router).bias.data[3] = -1e6
    result = report(loaded, text, wanted=1)
    table = result.frames["experts"].set_index(["layer", "expert"])
    assert table.loc[(layer.layer, 3), "verdict"] == "never reached"
    assert any(f"{layer.layer}:3" in note and "remove them unseen" in note for note in result.notes)
    assert {m.name: m.value for m in result.metrics}["experts_never_reached"] >= 1
