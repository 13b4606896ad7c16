"""Another number of experts per token: what another config would give, exactly nothing for the original's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import BadInput
from core.probes.top_k_what_if import TopKWhatIfSettings, top_k_what_if
from core.types import Prompt, silent
from tests.references import slow_rerouting
from tests.tiny import D_FF, D_MODEL, LAYERS, MOE, VOCAB, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")
THE_PROMPT = TopKWhatIfSettings(text="")


@pytest.mark.parametrize("family", MOE)
def test_the_original_number_changes_nothing_at_all(family: str) -> None:
    loaded = tiny_model(family)
    result = top_k_what_if(loaded, PROMPT, silent, TopKWhatIfSettings(text="", experts_per_token="1, 2"))
    frame = result.frame.set_index("original")
    k = loaded.anatomy.experts_per_token
    if k in (1, 2):
        assert frame.loc["as trained", "experts_per_token"] == k
        assert frame.loc["as trained", "delta_nats"] == 0
        assert frame.loc["as trained", "agreement"] == 1
        assert result.provenance.exactness_gap == 0


@pytest.mark.parametrize("family", MOE)
def test_every_number_is_what_its_config_would_give(family: str, tmp_path: Path) -> None:
    loaded = tiny_model(family)
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    frame = top_k_what_if(loaded, PROMPT, silent, THE_PROMPT).frame.set_index("experts_per_token")
    for k in (1, int(frame.index.max())):
        other = slow_rerouting.with_top_k(family, k, tmp_path / str(k))
        expected = float(slow_rerouting.nats(other, ids).double().mean())
        assert frame.loc[k, "nats"] == pytest.approx(expected, abs=1e-5)
        same = slow_rerouting.logits(other, ids).argmax(-1) == slow_rerouting.logits(loaded, ids).argmax(-1)
        assert frame.loc[k, "agreement"] == pytest.approx(float(same[:-1].double().mean()))


def test_bytes_per_token_are_the_formula() -> None:
    """b · (dense + L · k · 3 d I): OLMoE's parts counted by hand."""
    frame = top_k_what_if(
        tiny_model("olmoe"), PROMPT, silent, TopKWhatIfSettings(text="", weight_bits=8)
    ).frame
    attention = 2 * D_MODEL**2 + 2 * D_MODEL * D_MODEL // 2  # two of four heads for keys and values
    norms = 2 * D_MODEL + D_MODEL + D_MODEL // 2
    router = 4 * D_MODEL
    dense = LAYERS * (attention + norms + router) + D_MODEL + VOCAB * D_MODEL
    for row in frame.itertuples():
        expected = dense + LAYERS * row.experts_per_token * 3 * D_MODEL * D_FF
        assert row.bytes_per_token == expected
    assert frame["share_of_bytes"][frame["original"] != ""].tolist() == [1.0]


def test_over_documents_each_loss_has_an_interval_that_holds_it() -> None:
    frame = top_k_what_if(tiny_model("olmoe"), PROMPT, silent, TopKWhatIfSettings(max_tokens=1024)).frame
    assert (frame["low"] <= frame["delta_nats"]).all()
    assert (frame["delta_nats"] <= frame["high"]).all()
    assert (frame[frame["original"] == ""]["high"] > frame[frame["original"] == ""]["low"]).all()


def test_numbers_that_cannot_be_are_refused_with_those_that_can() -> None:
    loaded = tiny_model("olmoe")
    for typed in ("5", "0", "two"):
        with pytest.raises(BadInput, match=f"'{typed}' is none of 1 to 4"):
            top_k_what_if(loaded, PROMPT, silent, TopKWhatIfSettings(text="", experts_per_token=typed))


def test_a_router_of_groups_is_not_asked_for_more_than_its_groups_hold() -> None:
    """DeepSeek-V3 chooses among some groups: further experts have no score to be chosen by."""
    result = top_k_what_if(tiny_model("deepseek_v3"), PROMPT, silent, THE_PROMPT)
    most = int(result.frame["experts_per_token"].max())
    assert most < tiny_model("deepseek_v3").anatomy.n_experts
    assert any(f"so {most} per token are the most" in note for note in result.notes)
