"""Surprisal against one forward pass per prefix; bytes against the text itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.errors import BadInput
from core.probes import _distribution
from core.probes.token_surprisal import TokenSurprisalSettings, token_surprisal
from core.types import Prompt, silent
from tests.induction import START, induction_model, repeated_prompt
from tests.references.slow_probes import surprisal_by_hand
from tests.tiny import DECODERS, tiny_model

TEXT = "Paris costs 3 € 😀, naïve."
SETTINGS = TokenSurprisalSettings()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmoe"])
def test_surprisal_is_cross_entropy_of_each_prefix(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_model(family)
    monkeypatch.setattr(_distribution, "ROWS_BYTES", 4 * loaded.anatomy.vocab_size * 5)
    frame = token_surprisal(loaded, Prompt(TEXT), silent, SETTINGS).frame
    expected = surprisal_by_hand(loaded, loaded.tokenizer(TEXT)["input_ids"])
    assert frame["surprisal_nats"].iloc[1:].to_numpy() == pytest.approx(
        np.array(expected), rel=1e-4, abs=1e-5
    )
    assert frame["surprisal_bits"].iloc[1:].to_numpy() * math.log(2) == pytest.approx(
        np.array(expected), rel=1e-4
    )
    assert np.isnan(frame["surprisal_bits"].iloc[0]), "the first token has no prefix"


@pytest.mark.parametrize("family", DECODERS)
def test_headline_numbers_follow_from_the_rows(family: str) -> None:
    result = token_surprisal(tiny_model(family), Prompt(TEXT), silent, SETTINGS)
    assert result.provenance.exactness_gap == pytest.approx(0, abs=1e-5)
    metrics = {metric.name: metric.value for metric in result.metrics}
    scored = result.frame.iloc[1:]
    n_bytes = len(TEXT.encode()) - result.frame["n_bytes"].iloc[0]
    assert scored["n_bytes"].sum() == n_bytes
    assert metrics["bits_per_byte"] == pytest.approx(scored["surprisal_bits"].sum() / n_bytes)
    assert metrics["bits_per_byte"] == pytest.approx(scored["cumulative_bits_per_byte"].iloc[-1])
    assert metrics["perplexity"] == pytest.approx(2 ** metrics["mean_surprisal"])


def test_induction_model_is_surprised_by_the_first_half_alone() -> None:
    length = 12
    frame = token_surprisal(induction_model(40.0), repeated_prompt(length), silent, SETTINGS).frame
    repeated = frame["surprisal_nats"].iloc[length + 2 :]
    logit = 8.71697
    certain = math.log(math.exp(logit) + START) - logit
    assert repeated.to_numpy() == pytest.approx(certain, abs=1e-5)
    assert (frame["rank"].iloc[length + 2 :] == 1).all()
    assert frame["surprisal_nats"].iloc[2:length].min() > 1


def test_a_single_token_is_refused() -> None:
    with pytest.raises(BadInput, match="a single token"):
        token_surprisal(induction_model(40.0), Prompt("a"), silent, SETTINGS)
