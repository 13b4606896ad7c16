"""Embedding agreement: the identity, scipy as oracle, labelled pairs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from core.errors import BadInput, CannotMeasure
from core.evaluate.embedding_agreement import EmbeddingAgreementSettings, run, spearman
from core.journal import Journal
from core.models.embed import embed
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.text.sentences import sentences
from core.types import Documents, ModelRef, Result, silent
from tests.tiny import CORPUS, tiny_folder, tiny_model

TEXT = Documents("test text", "evaluation", tuple(f"{a} {b}" for a in CORPUS[:2] for b in CORPUS))


def _settings(**changed: Any) -> EmbeddingAgreementSettings:
    return EmbeddingAgreementSettings.model_validate({"bootstrap_draws": 500, "fp32_path": "exact"} | changed)


def _values(result: Result) -> dict[str, float]:
    return {metric.name: metric.value for metric in result.metrics}


@pytest.fixture
def shaken(tmp_path: Path) -> LoadedModel:
    loaded = open_model(ModelRef(str(tiny_folder("bert", tmp_path / "shaken"))))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return loaded


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    words = [" ".join(CORPUS[i % 4].split()[i % 5 : i % 5 + 3 + i // 5]) for i in range(40)]
    rows = [f"{(i * 7) % 11 / 2}\t{words[i]}\t{words[(i * 3 + 1) % 40]}" for i in range(40)]
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(rows))
    return path


def test_the_base_itself_agrees_exactly(pairs_file: Path):
    base = tiny_model("bert")
    result = run(base, base, TEXT, Journal(), silent, _settings(pairs=str(pairs_file)))
    found = {metric.name: (metric.value, metric.low, metric.high) for metric in result.metrics}
    assert found["cosine_agreement"] == found["cosine_agreement_p1"] == (1.0, 1.0, 1.0)
    assert found["delta_spearman"] == (0.0, 0.0, 0.0)
    assert found["spearman"] == found["spearman_base"]


def test_numbers_equal_their_definitions(shaken: LoadedModel, pairs_file: Path):
    base = tiny_model("bert")
    told: list[float] = []
    result = run(
        base,
        shaken,
        TEXT,
        Journal(),
        lambda done, total, _: told.append(done / total),
        _settings(pairs=str(pairs_file)),
    )
    values = _values(result)
    texts = [s for text in TEXT.texts for s in sentences(text, limit=12)]
    cosines = torch.nn.functional.cosine_similarity(embed(base, texts), embed(shaken, texts)).numpy()
    assert values["cosine_agreement"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert values["cosine_agreement_p1"] == pytest.approx(cosines.min(), abs=1e-6)
    assert 0 < values["cosine_agreement"] < 0.9999
    rows = [line.split("\t") for line in pairs_file.read_text().splitlines()]
    for name, model in (("spearman", shaken), ("spearman_base", base)):
        first, second = (embed(model, [row[i] for row in rows], max_tokens=128).double() for i in (1, 2))
        expected = stats.spearmanr([float(row[0]) for row in rows], (first * second).sum(1))
        assert values[name] == pytest.approx(expected.statistic, abs=1e-9)
    assert values["delta_spearman"] == pytest.approx(values["spearman"] - values["spearman_base"])
    for metric in result.metrics:
        assert metric.low <= metric.value <= metric.high
    assert told == sorted(told)
    assert told[-1] == 1.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_spearman_with_ties_equals_scipy(pairs: list[tuple[int, int]]):
    first, second = (np.array([pair[i] for pair in pairs], dtype=float) for i in (0, 1))
    if len(set(first)) > 1 and len(set(second)) > 1:
        expected = stats.spearmanr(first, second).statistic
        assert spearman(first[None], second[None])[0] == pytest.approx(expected, abs=1e-12)


def test_sentences_are_whole_and_long_enough():
    text = 'The first one has\nenough words. No. Is the second one "long" enough?  Yes, this one is too.\n\nx ::= y'
    assert sentences(text, limit=10) == [
        "The first one has enough words.",
        'Is the second one "long" enough?',
        "Yes, this one is too.",
    ]
    assert len(sentences(text, limit=1)) == 1


class TestRefusals:
    def test_vectors_of_another_length(self, tmp_path: Path):
        folder = tiny_folder("bert", tmp_path / "narrow")
        config = transformers.BertConfig.from_pretrained(folder)
        config.hidden_size, config.intermediate_size = 64, 64
        transformers.BertModel(config).save_pretrained(folder)
        narrow = open_model(ModelRef(str(folder)))
        with pytest.raises(BadInput, match="vectors of 128 and 64 numbers"):
            run(tiny_model("bert"), narrow, TEXT, Journal(), silent, _settings())

    def test_a_vector_that_is_not_finite(self, shaken: LoadedModel):
        with torch.no_grad():
            next(shaken.model.parameters())[:] = float("nan")
        with pytest.raises(CannotMeasure, match=r"the variant .* gives a vector that is not finite"):
            run(tiny_model("bert"), shaken, TEXT, Journal(), silent, _settings())

    def test_text_without_prose_and_calibration_text(self):
        base = tiny_model("bert")
        with pytest.raises(CannotMeasure, match="no sentence of five words"):
            run(
                base,
                base,
                Documents("code", "evaluation", ("x = 1\n\ny = 2",)),
                Journal(),
                silent,
                _settings(),
            )
        with pytest.raises(BadInput, match="loaded for calibration"):
            run(base, base, Documents("a", "calibration", TEXT.texts), Journal(), silent, _settings())

    def test_a_missing_pairs_file_is_found_before_any_work(self):
        base = tiny_model("bert")
        with pytest.raises(BadInput, match=r"gone\.tsv does not exist"):
            run(base, base, TEXT, Journal(), silent, _settings(pairs="gone.tsv"))
