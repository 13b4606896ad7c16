"""Labelled texts: the built-in sets are balanced and ask what they say; bad files are refused in one sentence."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest

from core.errors import BadInput
from core.text._templates import BUILTIN
from core.text.labelled import Labelled, last_word, load_labelled

ROWS = [
    (f"the {noun} is {how}", label, noun)
    for noun in "abcdefg"
    for how, label in (("red", "x"), ("wet", "y"), ("old", "x"))
]


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_set_is_balanced_without_repeats(name):
    data = load_labelled(f"builtin:{name}")
    assert len(set(data.texts)) == len(data.texts)
    assert len(set(Counter(data.labels).values())) == 1, "every label equally often"
    assert data.has_groups
    assert len(set(data.groups)) >= 10
    assert data.fingerprint == load_labelled(f"builtin:{name}").fingerprint


@pytest.mark.parametrize("name", ["number", "tense", "sentiment"])
def test_the_last_word_says_nothing_about_the_label(name):
    """So a probe of the embedding at the last token is at chance by construction."""
    data = load_labelled(f"builtin:{name}")
    labels = defaultdict(Counter)
    for text, label in zip(data.texts, data.labels, strict=True):
        labels[last_word(text)][label] += 1
    for counts in labels.values():
        assert len(set(counts.values())) == 1
        assert len(counts) == len(data.classes)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_file_gives_its_rows(tmp_path, suffix):
    path = tmp_path / f"set{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps({"text": t, "label": i % 2, "group": g}) for i, (t, _, g) in enumerate(ROWS)]
    else:
        comma = "," if suffix == ".csv" else "\t"
        lines = [comma.join(("Group", "Text", "Label")), *(comma.join((g, t, lab)) for t, lab, g in ROWS)]
    path.write_text("\n".join(lines), encoding="utf-8")
    data = load_labelled(str(path))
    assert data.texts == tuple(text for text, _, _ in ROWS)
    assert data.groups == tuple(group for _, _, group in ROWS)
    assert data.classes == (("0", "1") if suffix == ".jsonl" else ("x", "y"))


def test_quotes_keep_commas_and_line_breaks_in_a_csv(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text(
        "text,label\n" + "".join(f'"one, ""two""\nand {g}",{lab}\n' for _, lab, g in ROWS), encoding="utf-8"
    )
    data = load_labelled(str(path))
    assert data.texts[0] == 'one, "two"\nand a'
    assert not data.has_groups
    assert set(data.groups) == set("abcdefg"), "the last word stands in for the group"


def table(rows, header="text,label,group"):
    return "\n".join([header, *(",".join(row) for row in rows)]).encode()


BAD = {
    "one class": (table([(t, "x", g) for t, _, g in ROWS]), "two classes"),
    "too few rows": (table(ROWS[:5]), "at least 20"),
    "rare label": (table([*ROWS, ("the end", "z", "a")]), "label 'z'.*has 1 texts"),
    "too many labels": (table([(t, str(i), g) for i, (t, _, g) in enumerate(ROWS)]), "label column"),
    "no label column": (table(ROWS, "text,colour,group"), "must name text and label"),
    "not utf-8": ("text,label\ncaf\u00e9,x".encode("latin-1"), "not UTF-8"),
    "empty": (b"", "is empty"),
    "no text": (table([*ROWS, (" ", "x", "a")]), "has no text"),
    "some groups": (table([*ROWS, ("one more", "x", "")]), "no group"),
    "too few groups": (table([(t, lab, "one") for t, lab, _ in ROWS]), "at least 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_refused(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "set.csv"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        load_labelled(str(path))


@pytest.mark.parametrize(
    "line", ["{broken", "[1]", '{"text": 3, "label": "x"}', '{"text": "a", "label": ["x"]}']
)
def test_a_bad_json_line_is_named(tmp_path, line):
    path = tmp_path / "set.jsonl"
    path.write_text(line)
    with pytest.raises(BadInput, match="line 1"):
        load_labelled(str(path))


@pytest.mark.parametrize("source", ["", "builtin:nothing", "file.xlsx", "missing.csv"])
def test_an_unknown_source_lists_what_there_is(source):
    with pytest.raises(BadInput, match=r"builtin:number|does not exist"):
        load_labelled(source)


def test_the_fingerprint_is_of_the_rows():
    one = Labelled("a", ("t",), ("x",), ("g",), has_groups=True)
    assert one.fingerprint != Labelled("a", ("t",), ("y",), ("g",), has_groups=True).fingerprint
