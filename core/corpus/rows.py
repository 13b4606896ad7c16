"""What is learned from, before any tokenizer: rows of text, of conversation, of labelled text or of scored pairs.

A row has two names. Its *hash* is of everything in it. Its *key* is of what a model is given (the text, the pair, what
the user says; never the label, the score or the answer), blind to case and white space: rows of one key are the same
question, and must not be met both in training and outside it. Knows no file and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from core.text.disjoint import digest
from core.types import canonical_json, content_hash

Kind = Literal["text", "instruction", "labelled", "pairs"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One example; which fields are set follows from the kind of its ``Rows``."""

    text: str = ""
    """text: a document; labelled and pairs: the (first) text."""
    second: str = ""
    """labelled: the second text, if any; pairs: the second text."""
    label: str = ""
    score: float = 0.0
    """pairs: how similar people found the two."""
    messages: tuple[Message, ...] = ()
    """instruction: the conversation, in order."""

    @property
    def given(self) -> str:
        """What a model is given of this row, as one text; of a conversation all that it must not answer itself."""
        if self.messages:
            return "\n".join(turn.content for turn in self.messages if turn.role != "assistant")
        return f"{self.text}\n{self.second}" if self.second else self.text

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all its text."""
        texts = [self.text, self.second, *(turn.content for turn in self.messages)]
        return sum(len(text.encode(errors="surrogatepass")) for text in texts)


@dataclass(frozen=True)
class Rows:
    """Rows of one kind from one source, in the source's order."""

    name: str
    kind: Kind
    rows: tuple[Row, ...]
    licence: str = ""
    notes: tuple[str, ...] = ()
    """Plain sentences a reader must know, e.g. what was left out."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """Each row's content hash, label, score and answer included."""
        return tuple(_hash(row) for row in self.rows)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Each row's key: what is given, blind to case and white space. Of a pair both orders are the same."""
        return tuple(_key(row, self.kind) for row in self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of the kind and all rows, in order; the name has no part in it."""
        return content_hash([self.kind, *self.hashes])

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The different labels: in the order of numbers where all are whole numbers, else of the alphabet."""
        found = {row.label for row in self.rows} if self.kind == "labelled" else set()
        whole = all(label.removeprefix("-").isdecimal() for label in found)
        return tuple(sorted(found, key=int if whole else str))

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all texts together."""
        return sum(row.n_bytes for row in self.rows)

    def take(self, indices: Sequence[int], *, named: str, notes: tuple[str, ...] = ()) -> Rows:
        """Some of the rows, under another name and with further notes."""
        rows = tuple(self.rows[index] for index in indices)
        return replace(self, name=named, rows=rows, notes=(*self.notes, *notes))


def fold(text: str) -> str:
    """A text without what does not make it another: case, and how much white space of which kind."""
    return " ".join(text.casefold().split())


def _key(row: Row, kind: Kind) -> str:
    both = sorted((row.text, row.second)) if kind == "pairs" else [row.given]
    return digest("\n".join(map(fold, both))).hex()


def _hash(row: Row) -> str:
    return digest(canonical_json([row.text, row.second, row.label, row.score, row.messages])).hex()
