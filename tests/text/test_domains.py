from __future__ import annotations

import re
from datetime import date

import pytest

from core.errors import BadInput
from core.text._generated import arithmetic, dates
from core.text.documents import MIN_SHARED, load_documents, paragraphs
from core.text.domains import DOMAINS, EXTRACTS, _split_of, documents_by_domain, part


def long(texts: tuple[str, ...]) -> set[str]:
    flat = (" ".join(block.split()) for text in texts for block in paragraphs(text))
    return {block for block in flat if len(block) >= MIN_SHARED}


class TestDisjoint:
    @pytest.mark.parametrize("domain", ["prose", "c", "unicode", "json"])
    def test_no_long_paragraph_stands_in_two_splits(self, domain: str) -> None:
        splits = [
            load_documents(f"domain:{domain}", split=s).texts for s in ("evaluation", "calibration", "train")
        ]
        a, b, c = (long(texts) for texts in splits)
        assert a
        assert c
        assert not (a | b) & c
        assert not a & b

    def test_a_file_belongs_to_one_split_by_its_name_alone(self) -> None:
        names = [f"{i}.py" for i in range(4000)]
        shares = [
            sum(part(name) == split for name in names) for split in ("evaluation", "calibration", "train")
        ]
        assert sum(shares) == len(names)
        assert shares[0] == pytest.approx(500, abs=80)
        assert shares[1] == pytest.approx(500, abs=80)

    def test_what_pydoc_evaluates_on_is_never_trained_on(self) -> None:
        from pydoc_data.topics import topics

        from core.text.documents import half

        evaluated = [name for name in topics if half(name) == "evaluation"]
        assert len(evaluated) > 10
        assert {_split_of(f"topic:{name}") for name in evaluated} == {"evaluation"}


class TestDocuments:
    def test_all_domains_in_turn(self) -> None:
        each = documents_by_domain()
        assert set(each) <= set(DOMAINS)
        assert {"prose", "python", "unicode", "arithmetic", "json", "sql", "dates"} <= set(each)
        assert all(2 <= len(found.texts) <= EXTRACTS for found in each.values())
        whole = load_documents("domains")
        assert whole.texts[: len(each)] == tuple(found.texts[0] for found in each.values())
        assert sorted(whole.texts) == sorted(text for found in each.values() for text in found.texts)
        assert load_documents("domains", limit=3).texts == whole.texts[:3]

    def test_stable_and_told_apart_by_fingerprint(self) -> None:
        first = load_documents("domain:dates")
        assert first.fingerprint == load_documents("domain:dates").fingerprint
        assert first.fingerprint != load_documents("domain:dates", split="calibration").fingerprint

    def test_limited_by_bytes_but_never_empty(self) -> None:
        few = documents_by_domain(limit_bytes=7000)
        assert all(found.n_bytes <= 7000 for found in few.values())
        assert all(len(found.texts) == 1 for found in documents_by_domain(limit_bytes=1).values())

    def test_refuses_what_it_does_not_have(self) -> None:
        with pytest.raises(BadInput, match="there are: prose, python"):
            load_documents("domain:latin")
        with pytest.raises(BadInput, match="only domains"):
            load_documents("pydoc", split="train")


class TestGenerated:
    def test_sums_are_right(self) -> None:
        text = "\n".join(arithmetic(f"seed {i}", 2000) for i in range(20))
        found = re.findall(r"^(\d+) ?([-+*]) ?(\d+) ?= ?(-?\d+)$", text, flags=re.MULTILINE)
        assert len(found) > 100
        for a, sign, b, result in found:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)

    def test_weekdays_and_intervals_are_right(self) -> None:
        text = "\n".join(dates(f"seed {i}", 2000) for i in range(60))
        stamps = re.findall(r"^(\d{4}-\d\d-\d\d)T\S+ = (\w+),", text, flags=re.MULTILINE)
        assert len(stamps) > 20
        assert all(f"{date.fromisoformat(day):%A}" == name for day, name in stamps)
        intervals = re.findall(r"^from (\S+) to (\S+): (\d+) days", text, flags=re.MULTILINE)
        assert len(intervals) > 20
        for first, last, days in intervals:
            assert (date.fromisoformat(last) - date.fromisoformat(first)).days == int(days)

    def test_a_seed_writes_one_text(self) -> None:
        assert arithmetic("a", 500) == arithmetic("a", 500) != arithmetic("b", 500)
