"""Constant experts: the same output for every token, where a family can hold one; refused with the reason where not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.compress._pipeline import compress
from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.recipe import Recipe
from core.registry import get
from core.routing.discover import moe_layers
from core.routing.exhaustive import layer_inputs
from core.routing.merging_profile import expert_output
from core.routing.novices import output_moments
from core.routing.trace import token_ids
from core.types import Documents, Result, silent
from tests.compress.making import own_model
from tests.references.slow_experts import decisions
from tests.tiny import CORPUS, tiny_model

pytestmark = pytest.mark.rotating

TEXT = Documents("corpus", "calibration", CORPUS)


def novices(loaded: LoadedModel, **settings: object) -> Result:
    chosen = get("compress", "novice_experts")
    result: Result = chosen.run(loaded, TEXT, silent, chosen.parse({"calibration_tokens": 64, **settings}))
    return result


def test_moments_are_those_of_one_token_at_a_time() -> None:
    loaded = tiny_model("olmoe")
    at = moe_layers(loaded)[1]
    ids = token_ids(loaded, CORPUS[0])[:20]
    found = output_moments(loaded, moe_layers(loaded), [ids])[at.layer]
    hidden_TD, chosen_TK, _ = decisions(loaded.model, at.experts, ids)
    experts = loaded.model.get_submodule(at.experts)
    for e in range(at.n_experts):
        routed = [hidden_TD[t] for t in range(len(ids)) if e in chosen_TK[t].tolist()]
        assert found.tokens_E[e] == len(routed)
        if len(routed) > 1:
            out = torch.stack([expert_output(experts, e, x[None])[0].double() for x in routed])
            assert torch.allclose(found.mean_ED[e], out.mean(0), atol=1e-6)
            assert found.std_E[e] == pytest.approx(float(out.var(0, unbiased=True).sum().sqrt()), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "olmoe", "granitemoe"])
def test_a_novice_puts_out_its_mean_for_any_token(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    layers = moe_layers(loaded)
    result = novices(loaded, count=1)
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 1e-3
    table = result.frames["experts"]
    fresh = [(np.arange(24) * 37 % 500).tolist()]  # tokens nothing was fitted on
    inputs = layer_inputs(loaded, fresh, 24)
    for at in layers:
        (expert,) = table[(table["layer"] == at.layer) & (table["status"] == "constant")]["expert"]
        out_TD = expert_output(loaded.model.get_submodule(at.experts), expert, inputs[at.layer])
        assert float((out_TD - out_TD[0]).norm(dim=-1).max()) < 1e-3 * float(out_TD[0].norm())
        of_layer = table[table["layer"] == at.layer]
        assert of_layer.loc[of_layer["expert"] == expert, "score"].item() == of_layer["score"].min()
    assert result.frame["bytes_after"].sum() == result.frame["bytes_before"].sum()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_novices_reload_with_plain_transformers(family: str, tmp_path: Path) -> None:
    recipe = Recipe.of("novice_experts", count=1, calibration_tokens=64)
    made = compress(own_model(family, tmp_path), recipe, TEXT, tmp_path / "variant", silent)
    assert made.proof.passed
    assert made.proof.share_expert_parameters is not None
    assert 0 < made.proof.share_expert_parameters <= 0.25


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_moe", r"takes 2 · 128 neurons where an expert has 64"),
        ("deepseek_v3", r"takes 2 · 128 neurons"),
    ],
)
def test_a_family_that_can_hold_no_constant_is_refused_unchanged(
    family: str, reason: str, tmp_path: Path
) -> None:
    loaded = own_model(family, tmp_path)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    with pytest.raises(CannotCompress, match=reason):
        novices(loaded)
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
