"""Each row's side is its own, duplicates share one, and what cannot be learned is refused."""

from __future__ import annotations

import pytest

from core.corpus.rows import Row, Rows
from core.corpus.splits import refuse_poor_classes, refuse_unseen, split
from core.errors import BadInput

LONG = "A paragraph of more than eighty characters that stands in two documents, word for word."


def texts(*of: str) -> Rows:
    return Rows("set", "text", tuple(Row(text=text) for text in of))


def labelled(*of: tuple[str, str]) -> Rows:
    return Rows("set", "labelled", tuple(Row(text=text, label=label) for text, label in of))


def test_a_row_stays_on_its_side_whatever_is_added():
    few, many = texts(*map(str, range(60))), texts(*map(str, range(300)))
    train, held = split(few, held_out=0.3)
    more_train, more_held = split(many, held_out=0.3)
    assert set(train.hashes) < set(more_train.hashes)
    assert set(held.hashes) < set(more_held.hashes)
    assert set(more_train.hashes).isdisjoint(more_held.hashes)
    assert len(more_train) + len(more_held) == 300
    assert 0.2 < len(more_held) / 300 < 0.4
    assert split(many, held_out=0.3, seed=1)[1].hashes != more_held.hashes


def test_duplicates_fall_on_one_side():
    said = [f"Sentence {n}" for n in range(100)]
    rows = texts(*said, *(f"  {text.upper()}\n" for text in said))
    train, held = split(rows, held_out=0.5)
    assert set(train.keys).isdisjoint(held.keys)
    assert len(train) + len(held) == 200


def test_a_held_out_document_that_shares_a_paragraph_is_left_out():
    rows = texts(f"One.\n\n{LONG}", f"Two.\n\n{LONG}", *map(str, range(38)))
    parted = [split(rows, held_out=0.5, seed=seed) for seed in range(8)]
    apart = [(train, held) for train, held in parted if len(train) + len(held) == 39]
    assert 0 < len(apart) < 8
    for train, held in apart:
        assert held.notes == ("1 held-out documents share a paragraph with training ones and are left out.",)
        assert sum(LONG in row.text for row in train.rows) == 1
        assert not any(LONG in row.text for row in held.rows)
    assert all(
        len(train) + len(held) == 40 and not held.notes
        for train, held in parted
        if (train, held) not in apart
    )


def test_an_empty_side_is_refused():
    with pytest.raises(BadInput, match=r"none is (held out|learned from) \(1 are different\)"):
        split(texts("a", "A "))


def test_one_class_and_an_empty_class_are_refused():
    with pytest.raises(BadInput, match=r"all \d+ rows of set have the label 'x'"):
        split(labelled(*((str(n), "x") for n in range(40))), held_out=0.5)
    with pytest.raises(BadInput, match="'z' of set has no row to learn from"):
        refuse_poor_classes(labelled(("a", "x"), ("b", "y")), classes=("x", "y", "z"))


def test_a_label_that_is_never_learned_is_refused():
    rows = labelled(*((str(n), "xy"[n % 2]) for n in range(40)))
    held = split(rows, held_out=0.5)[1]
    rare = rows.rows.index(held.rows[0])
    poor = labelled(*((row.text, "rare" if n == rare else row.label) for n, row in enumerate(rows.rows)))
    with pytest.raises(BadInput, match="have a label that no training row has: 'rare'"):
        split(poor, held_out=0.5)
    with pytest.raises(BadInput, match=r"2 of 2 rows .* '0', '1'"):
        refuse_unseen(labelled(("a", "0"), ("b", "1")), ("x",))
