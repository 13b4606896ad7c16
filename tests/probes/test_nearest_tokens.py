"""Nearest tokens: layer 0 is its own token, the normed unembedding is the model's logits, values equal a slow loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from core.capture import capture_residual
from core.errors import BadInput, CannotMeasure
from core.models.readout import unembed
from core.probes.nearest_tokens import NearestTokensSettings, nearest_tokens
from core.types import Prompt, silent
from tests.tiny import DECODERS, FAMILIES, LAYERS, tiny_model

PROMPT = Prompt("The capital of France is Paris")
TEXT_FAMILIES = [family for family in FAMILIES if family != "vit"]


def run(family, **settings):
    return nearest_tokens(tiny_model(family), PROMPT, silent, NearestTokensSettings(**settings))


@pytest.mark.parametrize("family", [f for f in DECODERS if f not in ("gpt2", "opt")])
def test_at_layer_0_every_token_is_its_own_nearest(family):
    """Also for Gemma-2, whose embedding is scaled: an angle is blind to length."""
    result = run(family, layer=0)
    first = result.frame[result.frame["layer"] == 0]
    assert first["is_itself"].all()
    assert first["cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    assert (
        result.frames["nearest"]["token_id"].iloc[0]
        == tiny_model(family).tokenizer(PROMPT.text)["input_ids"][-1]
    )


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert"])
def test_a_model_that_adds_positions_says_so(family):
    assert any("adds a position" in note for note in run(family).notes)


@pytest.mark.parametrize("family", DECODERS)
def test_normed_dots_with_the_unembedding_rank_as_the_models_logits(family):
    """Identity 2, up to the head's bias, scale and softcap, which change no order where there is no bias."""
    loaded = tiny_model(family)
    found = run(family, space="unembedding", read="normed", measure="dot", top_k=20).frames["nearest"]
    ids = torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])
    with torch.inference_mode():
        logits = loaded.model(ids).logits[0, -1]
        with capture_residual(loaded) as residual:
            loaded.model(ids)
        head = loaded.model.get_submodule(loaded.anatomy.unembedding)
        assert head.bias is None
        again = unembed(loaded.model, loaded.anatomy, residual["final"][0, -1:])[0]
    assert found["token_id"].tolist() == logits.topk(20).indices.tolist() == again.topk(20).indices.tolist()


@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_values_equal_a_loop_over_the_vocabulary(family, measure):
    loaded = tiny_model(family)
    result = run(family, measure=measure, layer=2, position=1, top_k=5)
    ids = torch.tensor([loaded.tokenizer(PROMPT.text)["input_ids"]])
    with torch.inference_mode(), capture_residual(loaded) as residual:
        loaded.model(ids)
    vector = list(residual.values())[2][0, 1].double().tolist()
    rows = loaded.model.get_submodule(loaded.anatomy.embedding).weight.double().tolist()
    size = math.sqrt(sum(x * x for x in vector))
    dots = [sum(a * b for a, b in zip(vector, row, strict=True)) for row in rows]
    cosines = [dot / (size * math.sqrt(sum(x * x for x in row))) for dot, row in zip(dots, rows, strict=True)]
    values = cosines if measure == "cosine" else dots
    other = dots if measure == "cosine" else cosines
    best = sorted(range(len(rows)), key=lambda token: -values[token])[:5]
    found = result.frames["nearest"]
    assert found["token_id"].tolist() == best
    assert found["cosine"].tolist() == pytest.approx([cosines[token] for token in best], abs=1e-5)
    assert found["dot"].tolist() == pytest.approx([dots[token] for token in best], abs=1e-4 * size)
    assert found["rank_by_other"].tolist() == [1 + sum(o > other[token] for o in other) for token in best]
    cell = result.frame[(result.frame["layer"] == 2) & (result.frame["position"] == 1)].iloc[0]
    assert cell[measure] == pytest.approx(values[best[0]], rel=1e-4)
    assert result.provenance.exactness_gap < 1e-5


def test_the_map_has_every_layer_and_the_positions_asked_for():
    frame = run("llama", positions=2).frame
    assert sorted(frame["layer"].unique()) == list(range(LAYERS + 1))
    assert frame["position"].nunique() == 2
    assert np.isfinite(frame["cosine"]).all()


@pytest.mark.parametrize(
    ("settings", "message"), [({"layer": 7}, "layer 7 does not"), ({"position": 99}, "position 99 does not")]
)
def test_a_place_that_is_not_there_is_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        run("llama", **settings)


def test_a_model_without_unembedding_is_refused_for_that_space():
    with pytest.raises(CannotMeasure, match="set space to embedding"):
        run("bert", space="unembedding")
