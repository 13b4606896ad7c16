"""Ablating experts: zeroed weights give the same numbers, the reused prefix costs no bit, the unused lose nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.probes.expert_ablation import ExpertAblationSettings, expert_ablation
from core.types import Prompt, silent
from tests.compress.making import own_model
from tests.references import slow_rerouting
from tests.tiny import MOE, n_hooks, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")
THE_PROMPT = ExpertAblationSettings(text="")


@pytest.mark.parametrize("family", MOE)
def test_ablating_is_zeroing_the_experts_last_matrix(family: str, tmp_path: Path) -> None:
    loaded = own_model(family, tmp_path)
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    result = expert_ablation(loaded, PROMPT, silent, THE_PROMPT)
    assert result.provenance.exactness_gap == 0, "the reused prefix is exact"
    whole = slow_rerouting.nats(loaded, ids).double().mean()
    frame = result.frames["main"]
    assert len(frame) == sum(block.is_moe for block in loaded.anatomy.blocks) * loaded.anatomy.n_experts
    for row in frame.itertuples():
        undo = slow_rerouting.silence(loaded, row.layer, row.expert)
        without = slow_rerouting.nats(loaded, ids).double().mean()
        undo()
        assert row.delta_nats == pytest.approx(float(without - whole), abs=2e-6), row.name
    assert frame["delta_nats"].abs().max() > 1e-3


@pytest.mark.parametrize("family", MOE)
def test_an_expert_that_nobody_chose_loses_exactly_nothing(family: str) -> None:
    loaded = tiny_model(family)
    before = n_hooks(loaded.model)
    frame = expert_ablation(loaded, Prompt("one two"), silent, THE_PROMPT).frames["main"]
    unused = frame[frame["load"] == 0]
    assert (unused["delta_nats"] == 0).all()
    ids = loaded.tokenizer("one two")["input_ids"]
    chosen = {
        (layer, expert)
        for layer, (experts_TK, _) in slow_rerouting.decisions(loaded, ids).items()
        for expert in experts_TK.unique().tolist()
    }
    used = frame[frame["load"] > 0]
    assert set(zip(used["layer"], used["expert"], strict=True)) == chosen
    assert n_hooks(loaded.model) == before
    assert not any("forward" in vars(module) for module in loaded.model.modules())


def test_loads_sum_to_the_experts_of_a_token() -> None:
    loaded = tiny_model("mixtral")
    frame = expert_ablation(loaded, PROMPT, silent, ExpertAblationSettings(text="", layers="1, 2")).frames[
        "main"
    ]
    assert frame.groupby("layer")["load"].sum().to_dict() == pytest.approx({1: 2.0, 2: 2.0})


def test_over_documents_intervals_hold_their_numbers() -> None:
    result = expert_ablation(
        tiny_model("olmoe"), PROMPT, silent, ExpertAblationSettings(max_tokens=1024, layers="2")
    )
    frame = result.frames["main"]
    assert (frame["low"] < frame["delta_nats"]).all()
    assert (frame["delta_nats"] < frame["high"]).all()
    assert np.isfinite(frame["delta_nats_per_use"]).all()
