"""Text classification: known answers for the base itself, every number again by hand and by scikit-learn, refusals."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score

from core.corpus.learned import remember
from core.corpus.rows import Row, Rows
from core.corpus.splits import split
from core.errors import BadInput, CannotMeasure
from core.evaluate._class_scores import macro_f1
from core.evaluate._intervals import wilson
from core.evaluate.text_classification import TextClassificationSettings, run
from core.journal import Journal
from core.models.classify import class_logits, class_names, token_ids
from core.models.loaded import LoadedModel
from core.models.open import open_model
from core.types import ModelRef, Result, silent
from tests.tiny import CLASSIFIERS, tiny_folder, tiny_model

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
SETTINGS = TextClassificationSettings(bootstrap_draws=500)


def texts(n: int, *, seed: int = 0) -> Rows:
    """Texts of 2 to 30 seeded words with seeded labels."""
    drawn = np.random.default_rng(seed)
    rows = tuple(
        Row(text=" ".join(drawn.choice(WORDS, drawn.integers(2, 30))), label=f"LABEL_{drawn.integers(3)}")
        for _ in range(n)
    )
    return Rows("seeded", "labelled", rows)


def shaken(base: LoadedModel, rows: Rows) -> LoadedModel:
    """A copy whose head finds every class about as likely over ``rows``: its answers vary, and are not the base's."""
    model = copy.deepcopy(base.model)
    with torch.inference_mode():
        each = [model(**base.tokenizer(row.text, return_tensors="pt")).logits for row in rows.rows]
    with torch.no_grad():
        model.classifier.bias.sub_(torch.cat(each).mean(0))
    return dataclasses.replace(base, model=model, fingerprint="shaken")


def measured(base: LoadedModel, variant: LoadedModel, rows: Rows, **settings: int) -> Result:
    return run(base, variant, rows, Journal(), silent, SETTINGS.model_copy(update=settings))


def test_the_base_against_itself_is_exact() -> None:
    base = tiny_model("bert_classifier")
    found = {m.name: (m.value, m.low, m.high) for m in measured(base, base, texts(40)).metrics}
    assert found["kl"] == (0.0, 0.0, 0.0)
    assert found["flips"] == (0.0, 0.0, 0.0)
    assert found["top1_agreement"] == (1.0, 1.0, 1.0)
    assert found["accuracy"] == found["accuracy_base"]
    assert found["macro_f1"] == found["macro_f1_base"]


def test_every_number_is_that_of_texts_read_one_by_one() -> None:
    base, rows = tiny_model("bert_classifier"), texts(60)
    variant = shaken(base, rows)
    result = measured(base, variant, rows)
    label = np.array([int(row.label[-1]) for row in rows.rows])
    logits = []
    for loaded in (base, variant):
        with torch.inference_mode():
            each = [loaded.model(**loaded.tokenizer(r.text, return_tensors="pt")).logits for r in rows.rows]
        logits.append(torch.cat(each).double().log_softmax(-1).numpy())
    p, q = logits
    top_p, top_q = p.argmax(1), q.argmax(1)
    assert 0 < (top_p != top_q).sum() < 60
    value = {m.name: m.value for m in result.metrics}
    assert value["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-4)
    assert value["accuracy"] == (top_q == label).mean()
    assert value["flips"] == pytest.approx(((top_q == label) != (top_p == label)).mean())
    assert value["macro_f1"] == pytest.approx(f1_score(label, top_q, average="macro"))
    accuracy = next(m for m in result.metrics if m.name == "accuracy")
    assert (accuracy.low, accuracy.high) == wilson(int((top_q == label).sum()), 60)
    examples = result.frames["examples"]
    assert list(examples["example"]) == list(rows.hashes)
    assert examples["right"].mean() == value["accuracy"]


def test_macro_f1_is_that_of_scikit_learn_in_every_draw() -> None:
    drawn = np.random.default_rng(3)
    label, answer = drawn.integers(0, 7, 40), drawn.integers(0, 6, 40)
    counts = drawn.multinomial(40, np.full(40, 1 / 40), size=8)
    for row, found in zip(counts, macro_f1(counts, label, answer), strict=True):
        at = np.repeat(np.arange(40), row)
        assert found == pytest.approx(f1_score(label[at], answer[at], average="macro"))


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_batch_answers_as_each_text_alone(family: str) -> None:
    loaded = tiny_model(family)
    given = [row.text for row in texts(9).rows]
    encoded, cut = token_ids(loaded, given, None, max_tokens=256)
    together = class_logits(loaded, encoded)
    alone = torch.cat([class_logits(loaded, [one]) for one in encoded])
    assert cut == 0
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_pair_of_texts_is_told_apart() -> None:
    loaded = tiny_model("bert_classifier")
    encoded, _ = token_ids(loaded, ["one two"], ["Paris"], max_tokens=64)
    assert set(encoded[0]["token_type_ids"]) == {0, 1}
    with torch.inference_mode():
        expected = loaded.model(
            **loaded.tokenizer("one two", "Paris", return_tensors="pt", return_token_type_ids=True)
        ).logits
    torch.testing.assert_close(class_logits(loaded, encoded), expected)


def test_what_is_cut_is_said() -> None:
    base = tiny_model("bert_classifier")
    result = measured(base, base, texts(20), max_tokens=8)
    assert any("are longer than 8 tokens" in note for note in result.notes)


def test_a_journal_gives_the_same_numbers(tmp_path: Path) -> None:
    base, rows = tiny_model("bert_classifier"), texts(300)
    variant, file = shaken(base, rows), tmp_path / "j"
    first = run(base, variant, rows, Journal(file), silent, SETTINGS)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0])
    again = run(base, variant, rows, Journal(file), silent, SETTINGS)
    assert first.metrics == again.metrics
    pd.testing.assert_frame_equal(first.frames["examples"], again.frames["examples"])


def test_only_held_out_rows_of_the_training_file_are_measured() -> None:
    base, rows = tiny_model("bert_classifier"), texts(120)
    train, held = split(rows, held_out=0.3, seed=0)
    trained = dataclasses.replace(base)
    remember(trained, "file.csv", rows, train)
    result = measured(base, trained, rows)
    assert list(result.frames["examples"]["example"]) == list(held.hashes)
    assert any("held out" in note for note in result.notes)
    other = dataclasses.replace(rows, rows=(*train.rows[:2], *texts(50, seed=9).rows))
    with pytest.raises(BadInput, match=r"2 of 52 rows of seeded were learned from \(in seeded\): row 1"):
        measured(base, trained, other)


def test_what_makes_no_measurement_is_refused(tmp_path: Path) -> None:
    base = tiny_model("bert_classifier")
    wrong = dataclasses.replace(texts(20), rows=(*texts(20).rows, Row(text="one two", label="sports")))
    with pytest.raises(BadInput, match="'sports' is no class of"):
        measured(base, base, wrong)
    with pytest.raises(BadInput, match="at least 8"):
        measured(base, base, texts(4))
    with pytest.raises(CannotMeasure, match="is a encoder and names no classes"):
        class_names(tiny_model("bert"))
    folder = tiny_folder("bert_classifier", tmp_path / "m", seed=1)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("LABEL_0", "zero"))
    with pytest.raises(BadInput, match="do not name the same classes"):
        measured(base, open_model(ModelRef(str(folder))), texts(20))
