"""What a killed process leaves behind, and what the next one takes up."""

from __future__ import annotations

import pytest

from core.journal import Journal


def test_parts_come_back(tmp_path):
    first = Journal(tmp_path / "parts.jsonl")
    first.put("a", {"nats": 1.25})
    first.put("b", {"nats": 2.5})
    again = Journal(tmp_path / "parts.jsonl")
    assert (again.get("a"), again.get("b"), again.get("c")) == ({"nats": 1.25}, {"nats": 2.5}, None)


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_line_cut_short_anywhere_costs_only_itself(tmp_path, cut):
    file = tmp_path / "parts.jsonl"
    first = Journal(file)
    first.put("a", {"nats": 1.25})
    first.put("b", {"nats": 2.5})
    file.write_bytes(file.read_bytes()[:-cut])
    again = Journal(file)
    assert again.get("a") == {"nats": 1.25}
    assert again.get("b") == ({"nats": 2.5} if cut == 1 else None)  # only the line's end was lost
    again.put("c", {"nats": 3.0})
    third = Journal(file)
    assert third.get("a") == {"nats": 1.25}
    assert third.get("c") == {"nats": 3.0}


def test_without_a_file_it_is_memory_only():
    journal = Journal()
    journal.put("a", {})
    assert len(journal) == 1
