"""Head scores against loops, whole V × V matrices, and a model whose heads are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from core.capture import capture
from core.errors import BadInput, CannotMeasure
from core.models.anatomy import Anatomy
from core.models.anatomy_verify import eager_attention
from core.probes._repeat_scores import FROM_PATTERNS
from core.probes._repeats import repeated_tokens
from core.probes.head_scores import HeadScoresSettings, head_scores
from core.registry import get
from core.types import Prompt, Result, silent
from tests.induction import induction_model
from tests.references.slow_heads import ov_copying_by_hand
from tests.references.slow_probes import head_scores_by_hand
from tests.tiny import DECODERS, tiny_model

SMALL = HeadScoresSettings(length=12, sequences=2)


def scores(family_or_beta: str | float, settings: HeadScoresSettings = SMALL) -> Result:
    loaded = (
        tiny_model(family_or_beta) if isinstance(family_or_beta, str) else induction_model(family_or_beta)
    )
    return head_scores(loaded, Prompt(""), silent, settings)


def head(frame: pd.DataFrame, name: str) -> pd.Series:
    return frame.set_index("name").loc[name]


@pytest.mark.parametrize(("beta", "induction"), [(5.0, 0.886826), (10.0, 0.999161), (40.0, 1.0)])
def test_induction_model_has_the_closed_form_answers(beta: float, induction: float) -> None:
    main = scores(beta, HeadScoresSettings()).frames["main"]
    previous = np.mean([1 / (1 + p * math.exp(-beta)) for p in range(1, 25)])
    assert head(main, "L0H0")["previous_token"] == pytest.approx(previous, abs=1e-6)
    assert head(main, "L1H0")["induction"] == pytest.approx(induction, abs=1e-6)
    assert head(main, "L1H0")["induction_ci95"] == pytest.approx(0, abs=1e-6), "tokens do not matter to it"
    uniform = np.mean([1 / (p + 1) for p in range(13, 25)])
    for dead in ("L0H1", "L1H1"):
        assert head(main, dead)["induction"] == pytest.approx(uniform, abs=1e-6)
        assert head(main, dead)["duplicate_token"] == pytest.approx(uniform, abs=1e-6)
        assert head(main, dead)["bos_share"] == pytest.approx(np.mean([1 / (p + 1) for p in range(1, 25)]))
    assert main["ov_copying"].to_numpy() == pytest.approx([0, 0, 1, 0], abs=1e-9)


def test_the_induction_model_is_ranked_and_counted() -> None:
    result = scores(40.0, HeadScoresSettings())
    assert result.frame["name"].iloc[0] == "L1H0"
    metrics = {metric.name: metric for metric in result.metrics}
    assert metrics["induction_heads"].value == 1
    assert metrics["top_induction_score"].n == 8
    chance = math.log(17)
    assert metrics["loss_first_half"].value > chance, "it knows nothing of the first half"
    assert metrics["loss_second_half"].value == pytest.approx(math.log(1 + 16 * math.exp(-8.71697)), rel=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_copying_equals_that_of_the_whole_matrix(family: str) -> None:
    loaded = tiny_model(family)
    main = scores(family).frames["main"].set_index(["layer", "head"])
    for layer, index in ((0, 1), (1, 2), (2, 3)):
        expected = ov_copying_by_hand(loaded, layer, index)
        assert main.loc[(layer, index), "ov_copying"] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_a_wrong_key_value_grouping_gives_another_copying(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = [(layer, head) for layer in range(3) for head in (0, 3)]
    expected = [ov_copying_by_hand(tiny_model(family), *each) for each in heads]
    monkeypatch.setattr(Anatomy, "kv_head", lambda self, head: (head + 1) % self.n_kv_heads)
    found = scores(family).frames["main"].set_index(["layer", "head"]).loc[heads, "ov_copying"]
    assert np.abs(found - expected).max() > 1e-2


@pytest.mark.parametrize("family", DECODERS)
def test_scores_equal_the_slow_reference(family: str) -> None:
    loaded = tiny_model(family)
    result = scores(family)
    repeats = repeated_tokens(loaded, length=12, sequences=2, seed=0)
    paths = [block.attention for block in loaded.anatomy.blocks]
    by_hand = []
    for row in repeats.ids_SP:
        with (
            torch.inference_mode(),
            eager_attention(loaded.model),
            capture(loaded.model, paths, item=1) as maps,
        ):
            loaded.model(row[None])
        by_hand.append(head_scores_by_hand(maps[paths[1]][0, 2].tolist(), row.tolist()))
    found = head(result.frames["main"], "L1H2")
    for column, name in FROM_PATTERNS.items():
        assert found[column] == pytest.approx(np.mean([each[name] for each in by_hand]), rel=1e-4, abs=1e-6)
        half = 12.706205 * np.std([each[name] for each in by_hand], ddof=1) / math.sqrt(2)
        assert found[f"{column}_ci95"] == pytest.approx(half, rel=1e-3, abs=1e-6)
    assert result.provenance.exactness_gap == pytest.approx(0, abs=2e-6)
    assert not result.frames["main"].isna().any().any()


def test_sequences_are_seeded_one_by_one_and_distinct() -> None:
    loaded = tiny_model("llama")
    several = repeated_tokens(loaded, length=20, sequences=3, seed=5)
    alone = repeated_tokens(loaded, length=20, sequences=1, seed=7)
    assert torch.equal(several.ids_SP[2], alone.ids_SP[0])
    first, second = several.ids_SP[:, 1:21], several.ids_SP[:, 21:]
    assert torch.equal(first, second)
    assert all(len(set(row.tolist())) == 20 for row in first)
    assert (several.ids_SP[:, 0] == loaded.tokenizer.bos_token_id).all()
    assert not set(loaded.tokenizer.all_special_ids) & set(first.flatten().tolist())


def test_a_short_context_shortens_the_sequence_and_says_so() -> None:
    result = scores(10.0, HeadScoresSettings(length=50))
    assert result.provenance.conditions["length"] == 12
    assert any("12 instead of 50" in note for note in result.notes)


def test_a_narrow_window_is_named() -> None:
    result = scores("mistral", HeadScoresSettings(length=40, sequences=2))
    assert any("look back 32 positions at most" in note for note in result.notes)


def test_a_tokenizer_without_a_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model("llama")
    for name in ("bos_token_id", "eos_token_id", "cls_token_id"):
        monkeypatch.setattr(type(loaded.tokenizer), name, None, raising=False)
    with pytest.raises(CannotMeasure, match="no start or end token"):
        repeated_tokens(loaded, length=5, sequences=1, seed=0)


def test_ablating_the_induction_head_costs_the_second_half() -> None:
    settings = HeadScoresSettings(sequences=2, ablation="zero", x="ablation_effect", y="induction")
    result = scores(40.0, settings)
    effect = result.frames["main"].set_index("name")["ablation_effect"]
    # Without L1H0 every symbol is alike: ln 17; with it the answer leads by 8.71697.
    whole = math.log(1 + 16 * math.exp(-8.71697))
    assert effect["L1H0"] == pytest.approx(math.log(17) - whole, rel=1e-4)
    assert effect["L0H0"] > 1
    assert effect[["L0H1", "L1H1"]].to_numpy() == pytest.approx(0, abs=1e-6)
    assert result.views[0].y == "ablation_effect"
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-5)


def test_the_ablation_effect_is_refused_when_it_is_not_measured() -> None:
    with pytest.raises(BadInput, match="only measured when ablation is set"):
        scores("llama", HeadScoresSettings(x="ablation_effect"))


def test_ablation_is_told_to_cost_more() -> None:
    method, anatomy = get("probe", "head_scores"), tiny_model("llama").anatomy
    plain, ablated = (method.cost(anatomy, 10, method.parse({"ablation": a})) for a in ("none", "mean"))
    assert ablated.forwards > 5 * plain.forwards
