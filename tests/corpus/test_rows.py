"""A row's hash is of all of it, its key of what is given."""

from __future__ import annotations

from core.corpus.rows import Message, Row, Rows


def rows(*of: Row, kind="text", name="r") -> Rows:
    return Rows(name, kind, of)


def test_a_key_is_blind_to_case_white_space_and_the_answer():
    same = rows(Row(text="One  two", label="a"), Row(text=" one\nTWO ", label="b"), kind="labelled")
    assert len(set(same.keys)) == 1
    assert len(set(same.hashes)) == 2, "the hash is of every character, and of the label"


def test_a_pair_is_the_same_in_both_orders_and_a_labelled_pair_is_not():
    one, two = Row(text="a", second="b"), Row(text="b", second="a")
    assert len(set(rows(one, two, kind="pairs").keys)) == 1
    assert len(set(rows(one, two, kind="labelled").keys)) == 2, "premise and hypothesis differ"


def test_a_conversation_is_keyed_by_what_the_model_must_not_say():
    asked = (Message("system", "Be short."), Message("user", "Why?"))
    one, two = (Row(messages=(*asked, Message("assistant", said))) for said in ("Because.", "No."))
    assert len(set(rows(one, two, kind="instruction").keys)) == 1
    other = Row(messages=(Message("system", "Be long."), *one.messages[1:]))
    assert len(set(rows(one, other, kind="instruction").keys)) == 2


def test_the_fingerprint_is_of_the_rows_in_order():
    a, b = Row(text="a"), Row(text="b")
    assert rows(a, b).fingerprint == rows(a, b, name="other").fingerprint
    assert rows(a, b).fingerprint != rows(b, a).fingerprint
    assert rows(a).fingerprint != rows(a, kind="labelled").fingerprint


def test_classes_are_in_the_order_of_numbers_where_they_are_numbers():
    assert rows(*(Row(label=n) for n in ("10", "9", "-1")), kind="labelled").classes == ("-1", "9", "10")
    assert rows(*(Row(label=n) for n in ("10", "9", "x")), kind="labelled").classes == ("10", "9", "x")


def test_bytes_are_of_every_text():
    row = Row(text="é", second="ab")
    talk = Row(messages=(Message("user", "abc"), Message("assistant", "d")))
    assert (rows(row).n_bytes, rows(talk).n_bytes) == (4, 4)
