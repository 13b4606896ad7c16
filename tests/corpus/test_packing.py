"""Best fit against its slow, obvious form."""

from __future__ import annotations

import numpy as np
import pytest

from core.corpus.packing import best_fit, one_each


def slow_best_fit(lengths: list[int], window: int) -> list[list[int]]:
    """The same rule said plainly: of the rows with room, the fullest; of those, the one last put there."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, when it got it)
    for when, text in enumerate(sorted(range(len(lengths)), key=lambda text: -lengths[text])):
        fitting = [row for row, (room, _) in enumerate(rooms) if room >= lengths[text]]
        if not fitting:
            rows.append([])
            rooms.append((window, when))
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda row: (rooms[row][0], -rooms[row][1]))
        rows[row].append(text)
        rooms[row] = (rooms[row][0] - lengths[text], when)
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_best_fit(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 200)
    layout = best_fit(lengths, window=64)
    rows = [layout.texts(row).tolist() for row in range(layout.n_rows)]
    assert rows == slow_best_fit(lengths.tolist(), 64)
    assert sorted(text for row in rows for text in row) == list(range(200))
    assert max(lengths[row].sum() for row in rows) <= 64
    assert layout.n_rows <= 11 / 9 * -(-lengths.sum() // 64) + 1


def test_pairs_stay_together():
    layout = one_each(6, texts_per_row=2)
    assert [layout.texts(row).tolist() for row in range(layout.n_rows)] == [[0, 1], [2, 3], [4, 5]]
