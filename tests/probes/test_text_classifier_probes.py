"""Probes on a text classifier: what its answer is read from, for an encoder's and for a causal one."""

from __future__ import annotations

import pytest
import torch

from core.errors import SlimscopeError
from core.probes._read_out import read_out
from core.registry import methods
from core.types import Prompt, silent
from tests.tiny import tiny_model

PROMPT = Prompt("Water boils at one hundred degrees.")


@pytest.mark.parametrize(("family", "position"), [("bert_classifier", 0), ("llama_classifier", -1)])
def test_a_class_is_read_where_the_model_answers(family: str, position: int) -> None:
    loaded = tiny_model(family)
    encoded, answer = read_out(loaded, PROMPT, -1)
    assert int(answer.read_P.argmax()) == position % encoded.n_tokens
    with torch.inference_mode():
        output = loaded.model(**encoded.inputs)
    expected = output.logits[0, 2] - output.logits[0, 0]
    assert answer.score(output, "LABEL_2", "0") == expected
    assert answer.explained == "'LABEL_2' − 'LABEL_0'"
    with pytest.raises(SlimscopeError, match="no class of this model"):
        answer.score(output, "happy", "")


@pytest.mark.parametrize("family", ["bert_classifier", "llama_classifier"])
def test_every_probe_that_applies_gives_a_result_or_a_sentence(family: str) -> None:
    loaded = tiny_model(family)
    done = []
    for id_, probe in methods("probe").items():
        if probe.takes_reference or not loaded.supports(probe.needs):
            continue
        try:
            probe.run(loaded, PROMPT, silent, probe.parse({}))
        except SlimscopeError:
            continue
        done.append(id_)
    assert {"attention_pattern", "attention_relevance", "residual_norms", "linear_probe"} <= set(done)
