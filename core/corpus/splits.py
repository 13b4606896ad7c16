"""Which rows are learned from and which are held out: decided by each row's own key, and by nothing else.

So rows that ask the same (but for case and white space) fall on one side, and a row stays on its side when others are
added or taken away. Knows no file and no tokenizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from core.corpus.leakage import long_paragraphs_of
from core.corpus.rows import Rows
from core.errors import BadInput
from core.text.disjoint import digest


def split(rows: Rows, *, held_out: float = 0.1, seed: int = 0) -> tuple[Rows, Rows]:
    """(training, held-out) rows; about the share ``held_out`` of all keys is held out.

    A held-out document that shares a long paragraph with a training one is left out of both, and a note says how many.
    Raises ``BadInput`` where a side stays empty, or a label would never be learned.
    """
    train: list[int] = []
    held: list[int] = []
    for index, key in enumerate(rows.keys):
        (held if _place(key, seed) < held_out else train).append(index)
    if not train or not held:
        side = "held out" if train else "learned from"
        raise BadInput(
            f"of the {len(rows):,} rows of {rows.name} none is {side} ({len(set(rows.keys)):,} are different); give "
            f"more rows, or another share than held_out={held_out:g}"
        )
    held, notes = _without_shared_text(rows, train, held)
    parts = rows.take(train, named=rows.name), rows.take(held, named=f"{rows.name} (held out)", notes=notes)
    if rows.kind == "labelled":
        refuse_poor_classes(parts[0])
        refuse_unseen(parts[1], parts[0].classes)
    return parts


def refuse_poor_classes(train: Rows, *, classes: Sequence[str] | None = None) -> None:
    """``BadInput`` where there is one class only, or one of ``classes`` has no row at all."""
    counts = Counter(row.label for row in train.rows)
    if len(counts) < 2:
        raise BadInput(
            f"all {len(train):,} rows of {train.name} have the label {next(iter(counts), '')!r}; classes are learned from "
            "at least two"
        )
    empty = [label for label in classes or () if label not in counts]
    if empty:
        raise BadInput(
            f"{_listed(empty)} of {train.name} has no row to learn from; add some, or leave the class out"
        )


def refuse_unseen(rows: Rows, classes: Sequence[str]) -> None:
    """``BadInput`` naming the labels of ``rows`` that are none of the ``classes`` that are learned."""
    unseen = [label for label in rows.classes if label not in set(classes)]
    if unseen:
        n = sum(row.label in set(unseen) for row in rows.rows)
        raise BadInput(
            f"{n:,} of {len(rows):,} rows of {rows.name} have a label that no training row has: {_listed(unseen)}; add "
            "training rows with it, or leave those rows out"
        )


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that is a row's own."""
    return int.from_bytes(digest(f"{seed}:{key}")[:8], "big") / 2**64


def _without_shared_text(
    rows: Rows, train: Sequence[int], held: Sequence[int]
) -> tuple[list[int], tuple[str, ...]]:
    """The held-out documents that share no long paragraph with a training one, and what to say of the others."""
    if rows.kind != "text":
        return list(held), ()
    learned = set().union(*(long_paragraphs_of(rows.rows[index]) for index in train))
    kept = [index for index in held if learned.isdisjoint(long_paragraphs_of(rows.rows[index]))]
    if not kept:
        raise BadInput(
            f"each of the {len(held):,} held-out documents of {rows.name} shares a paragraph with a training one; give "
            "text that repeats itself less"
        )
    if len(kept) == len(held):
        return kept, ()
    dropped = len(held) - len(kept)
    return kept, (f"{dropped:,} held-out documents share a paragraph with training ones and are left out.",)


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(map(repr, labels[:5]))
    return f"{shown} and {len(labels) - 5} more" if len(labels) > 5 else shown
