"""What is written about SmolLM2's heads in docs/findings.md, found again on the real weights."""

from __future__ import annotations

import pytest

from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.probes.ablation_scan import AblationScanSettings, ablation_scan
from core.probes.attention_pattern import AttentionPatternSettings, attention_pattern
from core.probes.head_reading import HeadReadingSettings, head_reading
from core.probes.head_scores import HeadScoresSettings, head_scores
from core.types import ModelRef, Prompt, silent

pytestmark = [pytest.mark.slow, pytest.mark.rotating]
NAMES = Prompt("When Mary and John went to the store, John gave a drink to Mary. When Mary and John")


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return open_model(ModelRef("demo:smollm2"))


def test_its_induction_heads(smollm2: LoadedModel) -> None:
    result = head_scores(smollm2, Prompt(""), silent, HeadScoresSettings(sequences=4))
    assert result.frame["name"].head(4).tolist() == ["L18H6", "L17H3", "L17H4", "L17H5"]
    assert result.frame["induction"].iloc[0] == pytest.approx(0.89, abs=0.06)
    main = result.frames["main"]
    assert main.loc[main["previous_token"].idxmax(), "name"] == "L16H0"
    losses = {metric.name: metric.value for metric in result.metrics}
    assert losses["loss_second_half"] < losses["loss_first_half"] / 3
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-5)


def test_the_induction_head_reads_the_previous_token_head(smollm2: LoadedModel) -> None:
    result = head_reading(smollm2, NAMES, silent, HeadReadingSettings(layer=18, head=6))
    earlier = result.frames["composition_map"].sort_values("k_composition", ascending=False)
    assert "L16H0" in earlier["name"].head(2).tolist()
    chance = {metric.name: metric.value for metric in result.metrics}["composition_by_chance"]
    assert earlier["k_composition"].iloc[1] > 3 * chance
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-5)


def test_a_pattern_of_512_tokens_is_small_and_exact(smollm2: LoadedModel) -> None:
    text = Prompt(" ".join(str(number) for number in range(2, 258)))
    result = attention_pattern(smollm2, text, silent, AttentionPatternSettings(layer=18, head=6))
    assert result.provenance.conditions["tokens"] >= 512
    assert all(len(frame) <= 10_000 for frame in result.frames.values())
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-5)


def test_an_ablation_equals_a_whole_forward(smollm2: LoadedModel) -> None:
    prompt = Prompt("Mary gave John a drink to")
    result = ablation_scan(smollm2, prompt, silent, AblationScanSettings(ablation="zero"))
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-3)
    assert result.frame["name"].iloc[0] == "L0 MLP"
