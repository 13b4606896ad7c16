"""Pair files: both layouts, headers in any order, and the line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import BadInput
from core.text.pairs import load_pairs

ROWS = [(i / 2, f"a {i}", f"b {i}") for i in range(12)]


def _write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tabs_commas_and_headers_give_the_same_pairs(tmp_path: Path):
    files = [
        _write(tmp_path / "1.tsv", [f"{s}\t{a}\t{b}" for s, a, b in ROWS]),
        _write(tmp_path / "2.tsv", ["score\ttext_a\ttext_b", *(f"{s}\t{a}\t{b}" for s, a, b in ROWS)]),
        _write(tmp_path / "3.csv", ["sentence1,sentence2,label", *(f'"{a}","{b}",{s}' for s, a, b in ROWS)]),
    ]
    for file in files:
        pairs = load_pairs(file)
        assert list(zip(pairs.scores, pairs.first, pairs.second, strict=True)) == ROWS
    assert len({load_pairs(file).fingerprint for file in files}) == 1


def test_quotes_are_letters_between_tabs_and_quotes_between_commas(tmp_path: Path):
    tabs = _write(tmp_path / "a.tsv", [f'{i}\t"open {i}\tb' for i in range(12)])
    assert load_pairs(tabs).first[3] == '"open 3'
    commas = _write(tmp_path / "a.csv", [f'{i},"one, two",b' for i in range(12)])
    assert load_pairs(commas).first[3] == "one, two"


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["1\ta\tb"] * 5 + ["x\ta\tb"], "line 6 is not score, text, text"),
        (["1\ta\tb"] * 5 + ["1\ta"], "line 6 is not score, text, text"),
        (["rating\tq\tr", "1\ta\tb"], "line 1 is not score, text, text"),
        ([f"{i}\ta\tb" for i in range(9)], "9 pairs with 9 different scores"),
        (["3\ta\tb"] * 20, "20 pairs with 1 different scores"),
    ],
)
def test_bad_pairs_are_one_sentence(lines: list[str], sentence: str, tmp_path: Path):
    with pytest.raises(BadInput, match=sentence):
        load_pairs(_write(tmp_path / "a.tsv", lines))


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(BadInput, match=r"pairs file .* does not exist"):
        load_pairs(tmp_path / "gone.tsv")
