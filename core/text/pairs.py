"""Labelled sentence pairs: how similar people found two texts. Knows nothing about models.

A file has three columns, score, first text, second text: tab-separated (quotes are ordinary characters, as in
the SemEval STS files) or comma-separated (quoted as spreadsheets do). A header row is optional; with one,
the columns may stand in any order under the names of ``NAMES``.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from core.errors import BadInput
from core.text._files import read_text
from core.types import content_hash

NAMES = {
    "score": ("score", "similarity_score", "similarity", "label", "gold"),
    "first": ("text_a", "sentence1", "sentence_a", "text1", "a", "first"),
    "second": ("text_b", "sentence2", "sentence_b", "text2", "b", "second"),
}
MIN_PAIRS = 10
"""Fewer pairs give a rank correlation that means nothing."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts with the similarity people gave them; the three tuples are of equal length."""

    name: str
    scores: tuple[float, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Content hash of all pairs, in order."""
        return content_hash([self.scores, self.first, self.second])


def load_pairs(path: Path) -> Pairs:
    """Read a pairs file; raises ``BadInput`` naming the line that is wrong and what is expected."""
    lines = read_text(path, "pairs file").split("\n")
    tabs = "\t" in lines[0]
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
    scores: list[float] = []
    first: list[str] = []
    second: list[str] = []
    order = (0, 1, 2)
    for row in reader:
        if not row:
            continue
        if not scores and (named := _header(row)) is not None:
            order = named
            continue
        try:
            score, a, b = (row[index].strip() for index in order)
            scores.append(float(score))
        except (IndexError, ValueError):
            raise BadInput(
                f"{path} line {reader.line_num} is not score, text, text: {row!r}; separate three columns by "
                "tabs, or by commas with quotes"
            ) from None
        first.append(a)
        second.append(b)
    if len(scores) < MIN_PAIRS or len(set(scores)) < 2:
        raise BadInput(
            f"{path} has {len(scores)} pairs with {len(set(scores))} different scores; a rank correlation "
            f"needs at least {MIN_PAIRS} pairs that are not all alike"
        )
    return Pairs(path.name, tuple(scores), tuple(first), tuple(second))


def _header(row: list[str]) -> tuple[int, int, int] | None:
    """Where score, first and second text stand, if this row names them."""
    names = [cell.strip().lower() for cell in row]
    places = [next((names.index(n) for n in known if n in names), None) for known in NAMES.values()]
    score, first, second = places
    return None if score is None or first is None or second is None else (score, first, second)
