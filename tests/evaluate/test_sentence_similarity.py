"""Sentence similarity: correlations as SciPy's, exact for the base itself, no pair that was learned from."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from core.corpus.learned import remember
from core.corpus.rows import Row, Rows
from core.corpus.splits import split
from core.errors import BadInput
from core.evaluate.sentence_similarity import SentenceSimilaritySettings, run
from core.journal import Journal
from core.types import silent
from tests.tiny import tiny_model

WORDS = (
    "capital",
    "France",
    "Paris",
    "Rome",
    "water",
    "boils",
    "one",
    "hundred",
    "store",
    "drink",
    "Mary",
    "left",
)
SETTINGS = SentenceSimilaritySettings(bootstrap_draws=500)


def pairs(n: int) -> Rows:
    drawn = np.random.default_rng(0)
    said = [" ".join(drawn.choice(WORDS, drawn.integers(2, 9))) for _ in range(2 * n)]
    scores = drawn.integers(0, 50, n) / 10
    rows = tuple(
        Row(text=a, second=b, score=float(score))
        for a, b, score in zip(said[:n], said[n:], scores, strict=True)
    )
    return Rows("seeded", "pairs", rows)


def test_correlations_are_those_of_scipy() -> None:
    base = tiny_model("bert")
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        model.encoder.layer[-1].output.dense.weight.mul_(3)
    variant = dataclasses.replace(base, model=model, fingerprint="shaken")
    result = run(base, variant, pairs(40), Journal(), silent, SETTINGS)
    frame, value = result.frames["pairs"], {m.name: m for m in result.metrics}
    for end, column in (("", "similarity"), ("_base", "similarity_base")):
        assert value[f"spearman{end}"].value == pytest.approx(spearmanr(frame["score"], frame[column])[0])
        assert value[f"pearson{end}"].value == pytest.approx(pearsonr(frame["score"], frame[column])[0])
    assert value["spearman"].low < value["spearman"].value < value["spearman"].high
    assert value["cosine_agreement"].value < 1
    assert set(frame["example"]) == set(pairs(40).hashes)


def test_the_base_against_itself_is_exact() -> None:
    base = tiny_model("bert")
    found = {
        m.name: (m.value, m.low, m.high)
        for m in run(base, base, pairs(20), Journal(), silent, SETTINGS).metrics
    }
    assert found["delta_spearman"] == found["delta_pearson"] == (0.0, 0.0, 0.0)
    assert found["cosine_agreement"][0] == pytest.approx(1)


def test_learned_pairs_are_never_measured_in_either_order() -> None:
    base, rows = tiny_model("bert"), pairs(60)
    train, held = split(rows, held_out=0.3, seed=0)
    trained = dataclasses.replace(base)
    remember(trained, "pairs.tsv", rows, train)
    result = run(base, trained, rows, Journal(), silent, SETTINGS)
    assert set(result.frames["pairs"]["example"]) == set(held.hashes)
    turned = [dataclasses.replace(row, text=row.second, second=row.text) for row in train.rows]
    with pytest.raises(BadInput, match="were learned from"):
        run(
            base,
            trained,
            dataclasses.replace(rows, rows=(*held.rows, *turned[:3])),
            Journal(),
            silent,
            SETTINGS,
        )
