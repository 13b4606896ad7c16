"""What is learned must not be what is measured on: the same question, or a long paragraph of the same document.

Knows no file and no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from core.corpus.rows import Row, Rows
from core.errors import BadInput
from core.text.disjoint import long_paragraphs
from core.types import Documents

SHOWN = 3
"""Examples named in a refusal."""
EXCERPT = 60
"""Characters of an example that are shown."""


@dataclass(frozen=True)
class Leak:
    """A row that is measured on, and the training row that gives it away."""

    row: int
    train_row: int
    excerpt: str
    whole: bool
    """The same question; False: a long paragraph in common."""


def as_rows(documents: Documents) -> Rows:
    """Evaluation text as rows, to be compared with training rows."""
    texts = tuple(Row(text=text) for text in documents.texts)
    return Rows(f"{documents.name} ({documents.split})", "text", texts, documents.licence)


def long_paragraphs_of(row: Row) -> set[bytes]:
    """Hashes of the row's long paragraphs, blind to white space; of a conversation, of what is answered too."""
    said = "\n\n".join(turn.content for turn in row.messages) or row.given
    return long_paragraphs(said)


def leaks(train: Rows, other: Rows) -> list[Leak]:
    """The rows of ``other`` that training gives away, each once, with the first training row that does.

    The same question counts wherever it stands: a held-out text inside a training set of another kind counts too, as
    does a paragraph of ``MIN_SHARED`` characters where one of both is running text.
    """
    asked: dict[str, int] = {}
    for index, key in enumerate(train.keys):
        asked.setdefault(key, index)
    running = "text" in (train.kind, other.kind)
    said: dict[bytes, int] = {}
    if running:
        for index, row in enumerate(train.rows):
            for paragraph in long_paragraphs_of(row):
                said.setdefault(paragraph, index)
    found = []
    for index, row in enumerate(other.rows):
        if (at := asked.get(other.keys[index])) is not None:
            found.append(Leak(index, at, excerpt(row.given), whole=True))
        elif running and (shared := [said[p] for p in long_paragraphs_of(row) if p in said]):
            found.append(Leak(index, min(shared), excerpt(row.given), whole=False))
    return found


def refuse_leakage(train: Rows, other: Rows | Documents) -> None:
    """``BadInput`` naming examples, where training rows give away what is measured on."""
    measured = as_rows(other) if isinstance(other, Documents) else other
    if found := leaks(train, measured):
        raise BadInput(leakage_refusal(train, measured, found))


def leakage_refusal(train: Rows, measured: Rows, found: Sequence[Leak]) -> str:
    """Why a training on ``train`` is not measured on ``measured``, with examples."""
    examples = "; ".join(
        f"row {leak.row + 1} ({leak.excerpt!r}) {'is' if leak.whole else 'shares a paragraph with'} training row "
        f"{leak.train_row + 1}"
        for leak in found[:SHOWN]
    )
    return (
        f"{len(found):,} of {len(measured):,} rows of {measured.name} are learned from in {train.name}: {examples}; a "
        "number measured on them would mean nothing: leave them out of one of both"
    )


def duplicates(rows: Rows) -> dict[str, list[int]]:
    """Key → numbers of its rows, for keys of more than one row, the most frequent first."""
    counts = Counter(rows.keys)
    found: dict[str, list[int]] = {key: [] for key, n in counts.most_common() if n > 1}
    for index, key in enumerate(rows.keys):
        if key in found:
            found[key].append(index)
    return found


def excerpt(text: str, length: int = EXCERPT) -> str:
    """The beginning of a text on one line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"
