"""Experts per batch: counted with sets, k for one token, the formula for routers that choose at random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from core.errors import BadInput
from core.probes import batch_experts as module
from core.probes._routed_text import Choices
from core.probes.batch_experts import BatchExpertsSettings, batch_experts
from core.types import Prompt, silent
from tests.references import slow_rerouting
from tests.tiny import MOE, tiny_model

PROMPT = Prompt("The capital of France is Paris, and Mary gave a drink to John")


@pytest.mark.parametrize("family", MOE)
def test_counts_are_those_of_sets(family: str) -> None:
    loaded = tiny_model(family)
    ids = loaded.tokenizer(PROMPT.text)["input_ids"]
    result = batch_experts(loaded, PROMPT, silent, BatchExpertsSettings(text="", largest=len(ids)))
    assert result.provenance.exactness_gap == 0
    layers = result.frames["layers"].set_index(["layer", "tokens"])
    for layer, (experts_TK, _) in slow_rerouting.decisions(loaded, ids).items():
        for size in (1, 2, 4, len(ids)):
            runs = [
                len(set(experts_TK[low : low + size].flatten().tolist()))
                for low in range(len(ids) - size + 1)
            ]
            assert layers.loc[(layer, size), "experts"] == pytest.approx(np.mean(runs))
        assert layers.loc[(layer, 1), "random_places"] == experts_TK.shape[1]


def uniform_choices(n: int, n_experts: int, top_k: int) -> Choices:
    """Tokens that choose at random."""
    generator = np.random.default_rng(0)
    experts_TK = np.stack([generator.choice(n_experts, top_k, replace=False) for _ in range(n)])
    zeros_T = np.zeros(n, dtype=np.int64)
    return Choices(
        (0,),
        n_experts,
        top_k,
        experts_TK[None].astype(np.int16),
        np.ones((1, n, top_k), np.float32),
        zeros_T,
        zeros_T,
        None,
    )


def test_random_choices_follow_the_formula_and_equal_ones_stay_at_k() -> None:
    choices = uniform_choices(4096, 16, 2)
    sizes = np.array([1, 2, 4, 8, 16, 64])
    frame = module._frame(choices, sizes, np.random.default_rng(0))
    for column in ("experts", "random_places"):
        np.testing.assert_allclose(frame[column], frame["uniform"], atol=0.75)
    same = replace(
        choices, experts_LTK=np.broadcast_to(choices.experts_LTK[:, :1], choices.experts_LTK.shape)
    )
    frame = module._frame(same, sizes, np.random.default_rng(0))
    assert (frame[["experts", "random_places", "p95"]] == 2).all(axis=None)


def test_runs_do_not_cross_documents() -> None:
    """Two documents that use other experts: a run of half the text never sees both."""
    choices = uniform_choices(64, 8, 1)
    split = np.repeat([0, 1], 32)
    split_choices = replace(choices, document_T=split, experts_LTK=split[None, :, None].astype(np.int16))
    frame = module._frame(split_choices, np.array([1, 16]), np.random.default_rng(0)).set_index("tokens")
    assert frame.loc[16, "experts"] == 1
    assert frame.loc[16, "random_places"] > 1.9


def test_one_token_makes_no_batch() -> None:
    with pytest.raises(BadInput, match="one token makes no batch"):
        batch_experts(tiny_model("mixtral"), Prompt("a"), silent, BatchExpertsSettings(text=""))
