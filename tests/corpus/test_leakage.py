"""What is learned is not measured on: the same row in any spelling, or a long paragraph of running text."""

from __future__ import annotations

import pytest

from core.corpus.leakage import duplicates, leaks, refuse_leakage
from core.corpus.learned import remember
from core.corpus.rows import Message, Row, Rows
from core.corpus.sources import open_rows
from core.errors import BadInput
from core.material import material_of
from core.registry import get
from core.types import Documents
from tests.tiny import tiny_model

LONG = "A paragraph of more than eighty characters that stands in two documents, word for word."


def rows(*texts: str, kind="text") -> Rows:
    return Rows("train", kind, tuple(Row(text=text) for text in texts))


def test_the_same_row_leaks_in_any_spelling_and_kind():
    found = leaks(rows("x", "The  Answer", kind="labelled"), rows("the answer", "other", kind="labelled"))
    assert [(leak.row, leak.train_row, leak.whole) for leak in found] == [(0, 1, True)]
    assert leaks(rows("the answer"), rows("The answer", kind="labelled"))


def test_a_long_paragraph_leaks_and_a_short_one_does_not():
    train = rows(f"One.\n\n{LONG}\n\nThe end.")
    assert not leaks(train, rows("Two.\n\nThe end."))
    assert [leak.whole for leak in leaks(train, rows(f"Two.\n\n{LONG.replace(' ', chr(10), 3)}"))] == [False]


def test_evaluation_text_in_a_conversations_answer_leaks():
    talk = Rows("t", "instruction", (Row(messages=(Message("user", "Say it."), Message("assistant", LONG))),))
    with pytest.raises(
        BadInput,
        match=r"1 of 1 rows of doc \(evaluation\) are learned from in t: row 1 \('Title A para.*…'\) shares",
    ):
        refuse_leakage(talk, Documents("doc", "evaluation", (f"Title\n\n{LONG}\n",)))
    refuse_leakage(talk, Documents("doc", "evaluation", ("Title\n\nAnother.\n",)))


def test_duplicates_are_listed_by_how_often():
    assert list(duplicates(rows("a", "b", "A", "c", "b", "a ")).values()) == [[0, 2, 5], [1, 4]]


def test_text_that_was_learned_from_is_not_measured_on(tmp_path, monkeypatch) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {n} tells of {n * n} things. " * 60 for n in range(40)))
    rows = open_rows(str(path))
    loaded = tiny_model("llama")
    monkeypatch.setattr(loaded, "learned", ())
    remember(loaded, str(path), rows, rows)
    evaluation = get("evaluate", "language_modelling")
    plain = evaluation.parse({})
    with pytest.raises(BadInput, match=r"learned from \(in book"):
        material_of(evaluation, str(path), plain, learned=loaded.learned)
    assert material_of(evaluation, "pydoc", plain, learned=loaded.learned).texts
