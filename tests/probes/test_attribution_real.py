"""The attributions' worked examples on the real SmolLM2: what they are said to show, they show."""

from __future__ import annotations

from typing import Any

import pytest

from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, Result, silent

pytestmark = [pytest.mark.slow, pytest.mark.rotating]


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return open_model(ModelRef("demo:smollm2"))


def example(loaded: LoadedModel, id_: str, index: int, **more: Any) -> Result:
    """One of the probe's own examples."""
    method = get("probe", id_)
    chosen = method.examples[index]
    return method.run(loaded, chosen.prompt, silent, method.parse({**chosen.settings, **more}))


def by_token(result: Result) -> dict[str, float]:
    frame = result.frames["tokens"]
    return dict(zip(frame["token"], frame["score"], strict=True))


def test_one_head_writes_paris(smollm2: LoadedModel) -> None:
    result = example(smollm2, "direct_logit_attribution", 0)
    assert result.provenance.exactness_gap is not None
    assert result.provenance.exactness_gap < 1e-4
    assert result.frame["component"].iloc[0] == "L23H4"
    assert result.frame["share"].iloc[0] > 0.5


def test_a_neuron_tells_are_from_is(smollm2: LoadedModel) -> None:
    result = example(smollm2, "neuron_tokens", 0)
    first = result.frame.iloc[0]
    assert first["component"] == "L28N907"
    assert "' is'" in first["promotes"]
    assert "' are'" in first["suppresses"]


def test_france_is_what_makes_it_paris(smollm2: LoadedModel) -> None:
    for method in ("occlusion", "shapley_values"):
        result = example(smollm2, method, 0, quality_orders=2)
        assert result.frame["token"].iloc[0] == " France"
        values = {metric.name: metric.value for metric in result.metrics}
        assert values["insertion_above_random"] > 0
        assert values["deletion_below_random"] > 0


def test_a_counterfactual_path_converges_where_zeros_do_not(smollm2: LoadedModel) -> None:
    names = example(smollm2, "integrated_gradients", 0, quality_orders=0)
    values = {metric.name: metric.value for metric in names.metrics}
    assert values["missed_share"] < 0.01
    assert not names.flags
    assert by_token(names)[" Mary"] > 2
    zeros = example(smollm2, "integrated_gradients", 2, quality_orders=0)
    assert zeros.flags == ("not_converged",)


def test_the_fact_moves_to_the_last_word_between_layers(smollm2: LoadedModel) -> None:
    late = by_token(example(smollm2, "integrated_gradients", 1, quality_orders=0))
    early = by_token(example(smollm2, "integrated_gradients", 1, quality_orders=0, start_layer=10))
    assert early[" France"] > 0.9 * sum(early.values())
    assert late[" is"] > 0.9 * sum(late.values())
