"""The handwritten digits that ``digits:N`` names: 1,797 grey pictures of 8 × 8 pixels with their labels.

The rows of scikit-learn's ``load_digits`` in their order, kept in this package (45 kB), so that nothing needs
scikit-learn when a model is looked at. They are the test half of "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0), by 13 writers. Knows nothing of models.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput

FILE = Path(__file__).parent / "digits.npz"
LICENCE = "CC BY 4.0"
LARGEST_VALUE = 16
"""Pixels count the inked dots of 4 × 4 blocks: 0 (paper) to 16 (ink)."""
N_ROWS = 1797
HELD_OUT = range(1347, N_ROWS)
"""Rows ``demo:vit`` was not trained on: the last quarter. Rows come writer after writer, so a cut in their order, unlike
a shuffled one, mostly asks for writers that were never seen."""


def digit(row: int) -> tuple[NDArray[np.uint8], int]:
    """One picture [8, 8] as grey levels (0 paper to 255 ink) and its label; raises ``BadInput`` for an unknown row."""
    if not 0 <= row < N_ROWS:
        raise BadInput(f"digits:{row} does not exist; rows go from digits:0 to digits:{N_ROWS - 1}")
    images, labels = _rows()
    return grey_levels(images[row]), int(labels[row])


def all_digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Every picture as grey levels [1797, 8, 8], and the labels [1797]."""
    images, labels = _rows()
    return grey_levels(images), labels


def grey_levels(counts: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The data set's 0 to 16 as grey levels 0 to 255, rounded."""
    levels: NDArray[np.uint8] = np.rint(counts * (255 / LARGEST_VALUE)).astype(np.uint8)
    return levels


@cache
def _rows() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    with np.load(FILE, allow_pickle=False) as stored:
        return stored["images"], stored["labels"]
