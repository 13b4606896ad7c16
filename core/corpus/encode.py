"""From rows to token ids: which texts there are, and which of their tokens are learned.

T tokens of all texts, end to end; S texts. Knows the tokenizer and no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.corpus.instruction import answers
from core.corpus.rows import Row, Rows
from core.errors import BadInput

TooLong = Literal["refuse", "cut"]
AT_ONCE = 256
"""Texts given to the tokenizer in one call, which spreads them over threads."""


@dataclass(frozen=True)
class Encoded:
    """All texts as token ids."""

    ids_T: NDArray[np.int32]
    learned_T: NDArray[np.bool_]
    """Whether the token is a target of the position before it."""
    bounds_S1: NDArray[np.int64]
    """Text s is ``ids_T[bounds_S1[s]:bounds_S1[s + 1]]``."""
    row_S: NDArray[np.int64]
    """Number of the row in ``Rows`` that the text is from."""
    types_T: NDArray[np.int8] | None
    """1 in the second text of a labelled pair; None where no text has two."""
    n_cut: int
    """Rows of which not all could be taken: tokens behind the window are lost."""


class _Text(NamedTuple):
    """One text, as arrays: a corpus of Python integers would be nine times as large."""

    ids: NDArray[np.int32]
    learned: NDArray[np.bool_]
    row: int
    types: NDArray[np.int8] | None = None


def encode(rows: Rows, tokenizer: Any, *, window: int, too_long: TooLong = "refuse") -> Encoded:
    """Every text of ``rows`` in at most ``window`` tokens.

    A document longer than that goes on in further texts, which overlap by one token, so that each token but the first
    is learned exactly once; each begins and ends with the special tokens that the tokenizer puts around a text.
    Everything else is one text a row (of scored pairs two): with ``too_long="refuse"`` ``BadInput`` says how many are
    too long, with ``"cut"`` their ends are lost and counted.
    """
    texts = [
        text
        for start in range(0, len(rows), AT_ONCE)
        for text in _texts(rows, range(start, min(start + AT_ONCE, len(rows))), tokenizer, window)
    ]
    over = [text for text in texts if len(text.ids) > window]
    if over and too_long == "refuse":
        longest = max(len(text.ids) for text in over)
        raise BadInput(
            f"{len({text.row for text in over}):,} of {len(rows):,} rows of {rows.name} are longer than the window "
            f"of {window} tokens (the longest has {longest:,}, the first is row {over[0].row + 1}); set window to "
            f"{longest}, or leave them out"
        )
    if rows.kind == "instruction":
        silent = [text.row + 1 for text in texts if not text.learned[:window].any()]
        if silent:
            raise BadInput(
                f"{len(silent):,} of {len(rows):,} conversations of {rows.name} have no answer within {window} tokens "
                f"(the first is row {silent[0]}); set a longer window, or leave them out"
            )
    behind = len(special_tokens(tokenizer)[1]) if over and rows.kind != "instruction" else 0
    return _joined([_cut(text, window, behind) for text in texts], n_cut=len({text.row for text in over}))


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer by itself puts before and behind a text, e.g. ``[CLS]`` and ``[SEP]``."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    before = next(i for i in range(len(whole) - len(alone) + 1) if whole[i : i + len(alone)] == alone)
    return whole[:before], whole[before + len(alone) :]


def _texts(rows: Rows, numbers: range, tokenizer: Any, window: int) -> Iterator[_Text]:
    """The texts of some rows."""
    some = [rows.rows[number] for number in numbers]
    if rows.kind == "instruction":
        for number, row in zip(numbers, some, strict=True):
            ids, learned = answers(row.messages, tokenizer, where=f"{rows.name} row {number + 1}")
            yield _Text(ids, learned, number)
    elif rows.kind == "labelled":
        yield from _labelled(some, numbers, tokenizer)
    elif rows.kind == "pairs":
        firsts = tokenizer([row.text for row in some], verbose=False)["input_ids"]
        seconds = tokenizer([row.second for row in some], verbose=False)["input_ids"]
        for number, *both in zip(numbers, firsts, seconds, strict=True):
            yield from (_given(ids, number) for ids in both)
    else:
        before, behind = special_tokens(tokenizer)
        bodies = tokenizer([row.text for row in some], add_special_tokens=False, verbose=False)["input_ids"]
        for number, body in zip(numbers, bodies, strict=True):
            yield from _pieces(body, before, behind, window, number)


def _labelled(some: Sequence[Row], numbers: range, tokenizer: Any) -> Iterator[_Text]:
    seconds = [row.second for row in some]
    if not any(seconds):
        found = tokenizer([row.text for row in some], verbose=False)["input_ids"]
        yield from (_given(ids, number) for ids, number in zip(found, numbers, strict=True))
        return
    found = tokenizer([row.text for row in some], seconds, verbose=False)
    # Some models have no embedding of which text a token is in; their tokenizers give no types.
    types = found.get("token_type_ids") or [None] * len(some)
    for number, ids, type_ in zip(numbers, found["input_ids"], types, strict=True):
        yield _given(ids, number, None if type_ is None else np.array(type_, dtype=np.int8))


def _given(ids: Sequence[int], row: int, types: NDArray[np.int8] | None = None) -> _Text:
    """A text of which no token is learned."""
    return _Text(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.bool_), row, types)


def _pieces(body: list[int], before: list[int], behind: list[int], window: int, row: int) -> Iterator[_Text]:
    """A document in texts of at most ``window`` tokens."""
    room = window - len(before) - len(behind)
    if room < 2:
        raise BadInput(f"a window of {window} tokens has no room for text; set a longer one")
    for start in range(0, max(len(body) - 1, 1), room - 1):
        ids = np.array([*before, *body[start : start + room], *behind], dtype=np.int32)
        learned = np.ones(len(ids), dtype=np.bool_)
        # The first token of a further text ended the one before it and was learned there; the very first of a
        # document can be told only from a special token before it.
        learned[: len(before) + (start > 0 or not before)] = False
        yield _Text(ids, learned, row)


def _cut(text: _Text, window: int, n_behind: int) -> _Text:
    """The text without the end that is too long, but with the special tokens behind it."""
    if len(text.ids) <= window:
        return text
    kept = np.r_[0 : window - n_behind, len(text.ids) - n_behind : len(text.ids)]
    types = None if text.types is None else text.types[kept]
    return _Text(text.ids[kept], text.learned[kept], text.row, types)


def _joined(texts: list[_Text], *, n_cut: int) -> Encoded:
    """All texts end to end."""
    paired = any(text.types is not None for text in texts)
    types = [np.zeros(len(text.ids), np.int8) if text.types is None else text.types for text in texts]
    return Encoded(
        ids_T=np.concatenate([text.ids for text in texts]),
        learned_T=np.concatenate([text.learned for text in texts]),
        bounds_S1=np.cumsum([0, *(len(text.ids) for text in texts)], dtype=np.int64),
        row_S=np.array([text.row for text in texts], dtype=np.int64),
        types_T=np.concatenate(types) if paired else None,
        n_cut=n_cut,
    )
