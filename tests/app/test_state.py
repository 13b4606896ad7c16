"""What the address and the boxes share."""

from __future__ import annotations

from app.state import distinct


def test_a_title_of_two_ids_names_them_both():
    assert distinct({"a": "tiny", "b": "tiny", "c": "large"}) == {
        "a": "tiny (a)",
        "b": "tiny (b)",
        "c": "large",
    }
