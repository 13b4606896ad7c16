"""Residual norms: the stream is the sum of what was written to it, and known sinks are found."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from core.capture import capture_residual
from core.errors import SlimscopeError
from core.models.open import open_model
from core.probes.residual_norms import ResidualNormsSettings, residual_norms
from core.types import ModelRef, Prompt, silent
from tests.induction import D, induction_model, repeated_prompt
from tests.tiny import FAMILIES, tiny_folder, tiny_model

PROMPT = Prompt("The capital of France is Paris, and the capital of Italy is Rome")
SETTINGS = ResidualNormsSettings()
TEXT_FAMILIES = [family for family in FAMILIES if family != "vit"]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_stream_is_the_sum_of_what_was_written(family: str) -> None:
    loaded = tiny_model(family)
    result = residual_norms(loaded, PROMPT, silent, SETTINGS)
    if loaded.anatomy.norm_place == "post":
        assert result.provenance.exactness_gap is None
    else:
        assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-6)
    after = result.frame[result.frame["layer"] > 0]
    assert after["attention_share"].between(0, 1).all()
    assert after["cosine_to_previous"].between(-1 - 1e-6, 1 + 1e-6).all()
    assert (after[["attention_norm", "mlp_norm"]] > 0).all(axis=None)


@pytest.mark.parametrize("family", ["llama", "bert", "opt"])
def test_norms_and_largest_dimensions_equal_the_captured_stream(family: str) -> None:
    loaded = tiny_model(family)
    frame = residual_norms(loaded, PROMPT, silent, SETTINGS).frame
    ids = torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])
    with torch.inference_mode(), capture_residual(loaded) as residual:
        loaded.model(ids)
    rows = frame.set_index(["layer", "position"])
    for layer, stream in enumerate(residual.values()):
        for position, vector in enumerate(stream[0].tolist()):
            row = rows.loc[(layer, position)]
            assert row["norm"] == pytest.approx(math.sqrt(sum(x * x for x in vector)), rel=1e-5)
            assert row["top_value"] == max(vector, key=abs)
            assert vector[row["top_dimension"]] == row["top_value"]


def test_induction_model_has_the_closed_form_norms() -> None:
    """Every code is a pair ±1, so a stream holding n codes has norm √(2n)."""
    length = 12
    loaded = induction_model(40.0)
    frame = residual_norms(loaded, repeated_prompt(length), silent, SETTINGS).frame
    half = frame[frame["position"] > length]
    for layer, codes in ((0, 2), (1, 3), (2, 4)):
        norms = half.loc[half["layer"] == layer, "norm"].to_numpy()
        assert norms == pytest.approx(math.sqrt(2 * codes), abs=1e-4)
    last = half[half["layer"] == 2]
    assert last["attention_share"].to_numpy() == pytest.approx(1), "the MLP of this model writes nothing"
    assert last["cosine_to_previous"].to_numpy() == pytest.approx(math.sqrt(3 / 4), abs=1e-4)


def test_a_planted_sink_and_massive_activation_are_found() -> None:
    loaded = induction_model(40.0)
    embedding = loaded.model.transformer.wpe.weight
    saved = embedding[0].clone()
    with torch.no_grad():
        embedding[0, D - 1] = 5_000.0
    try:
        result = residual_norms(loaded, repeated_prompt(6), silent, SETTINGS)
    finally:
        with torch.no_grad():
            embedding[0] = saved
    sinks = result.frames["sinks"]
    assert sinks["position"].tolist() == [0]
    assert sinks.loc[0, ["first_layer", "n_layers", "top_dimension", "massive"]].tolist() == [
        0,
        3,
        D - 1,
        True,
    ]
    assert {metric.name: metric.value for metric in result.metrics} == {
        "sink_positions": 1,
        "massive_activations": 3,
    }


def test_positions_choose_rows_without_changing_them() -> None:
    loaded = tiny_model("llama")
    whole = residual_norms(loaded, PROMPT, silent, SETTINGS).frame
    part = residual_norms(loaded, PROMPT, silent, ResidualNormsSettings(positions=3)).frame
    first = whole["position"].max() - 2
    assert part.equals(whole[whole["position"] >= first].reset_index(drop=True))


def test_a_stream_that_is_not_finite_names_its_layer(tmp_path: Path) -> None:
    loaded = open_model(ModelRef(str(tiny_folder("llama", tmp_path))))
    with torch.no_grad():
        loaded.model.get_submodule(loaded.anatomy.blocks[1].path).mlp.down_proj.weight[3, 3] = math.inf
    with pytest.raises(SlimscopeError, match="after layer 2 is not finite"):
        residual_norms(loaded, PROMPT, silent, SETTINGS)
