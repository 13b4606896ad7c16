"""Which texts share a row: as few rows as best fit finds, or one text a row. Knows lengths only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Texts in rows: row r holds texts ``texts_S[bounds_R1[r]:bounds_R1[r + 1]]``, in this order."""

    texts_S: Ints
    bounds_R1: Ints

    @property
    def n_rows(self) -> int:
        """Rows."""
        return len(self.bounds_R1) - 1

    def texts(self, row: int) -> Ints:
        """The numbers of the texts in a row."""
        return self.texts_S[self.bounds_R1[row] : self.bounds_R1[row + 1]]


def one_each(n_texts: int, *, texts_per_row: int = 1) -> Layout:
    """Every text in a row of its own, or so many neighbours (the two of a pair)."""
    return Layout(
        np.arange(n_texts, dtype=np.int64), np.arange(0, n_texts + 1, texts_per_row, dtype=np.int64)
    )


def best_fit(lengths_S: NDArray[Any], *, window: int) -> Layout:
    """Texts in rows of at most ``window`` tokens: the longest first, each where it leaves the least room.

    Best fit decreasing never needs more than 11/9 of the fewest possible rows, plus one (Johnson 1974). Texts of one
    length keep their order, so the same lengths give the same rows. No text may be longer than the window.
    """
    assert len(lengths_S) == 0 or lengths_S.max() <= window, f"a text of {lengths_S.max()} in {window}"
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(window + 1)]
    rooms = 0  # bit n is set where some row has room for exactly n more tokens
    for text in np.argsort(-lengths_S.astype(np.int64), kind="stable"):
        length = int(lengths_S[text])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = window, len(rows)
            rows.append([])
        rows[row].append(int(text))
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Layout(np.array([text for row in rows for text in row], dtype=np.int64), bounds)
