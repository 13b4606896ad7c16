"""Labelled sentence pairs: how similar people found two texts. Knows nothing about models.

A file has three columns, score, first text, second text: tab-separated (quotes are ordinary characters, as in
the SemEval STS files) or comma-separated (quoted as spreadsheets do). A header row is optional; with one,
the columns may stand in any order under the names of ``NAMES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core.errors import BadInput
from core.text._files import read_text
from core.text.tables import read_table
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
    scores: list[float] = []
    first: list[str] = []
    second: list[str] = []
    tabs = "\t" in read_text(path, "pairs file").split("\n", 1)[0]
    for place, cells in read_table(path, "pairs file", is_header=_names_all, tabs=tabs):
        order = [
            next((n for n in known if n in cells), str(at)) for at, known in enumerate(NAMES.values(), 1)
        ]
        try:
            score, a, b = (cells[column].strip() for column in order)
            scores.append(float(score))
        except (KeyError, ValueError):
            raise BadInput(
                f"{place} is not score, text, text: {list(cells.values())!r}; separate three columns by "
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


def _names_all(header: list[str]) -> bool:
    return all(any(name in header for name in known) for known in NAMES.values())
