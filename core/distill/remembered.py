"""What a teacher says of a row, asked once: class logits or sentence vectors are small enough to keep in memory.

The teacher reads each row alone and without padding, so that its answer does not depend on the batch in which a row is
first met, nor on whether a training was interrupted. Knows no loss.

Legend: B rows of a batch, P positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch


TABLE = 1024


class Remembered:
    """Answers of ``ask`` by content of the row: rows that are the same are asked once.

    They are copied into tables of ``TABLE`` rows. Small tensors kept one by one would lie between the large ones that
    the teacher frees, and pin their memory.
    """

    def __init__(self, ask: Callable[[Batch], Tensor]) -> None:
        self._ask = ask
        self._place: dict[bytes, int] = {}
        self._tables: list[Tensor] = []

    def __call__(self, batch: Batch) -> Tensor:
        """The answers of all rows [B, …] in float32, on the batch's device."""
        answers = []
        for index in range(len(batch.ids_BP)):
            row = _row(batch, index)
            whole = hashlib.sha256(row.ids_BP.cpu().numpy().tobytes())
            if row.types_BP is not None:
                whole.update(row.types_BP.cpu().numpy().tobytes())
            key = whole.digest()
            if key not in self._place:
                self._place[key] = self._kept(row)
            table, at = divmod(self._place[key], TABLE)
            answers.append(self._tables[table][at])
        return torch.stack(answers).to(batch.ids_BP.device)

    def _kept(self, row: Batch) -> int:
        """Ask, and keep the answer; its number."""
        with torch.no_grad():
            answer = self._ask(row)[0]
        number = len(self._place)
        table, at = divmod(number, TABLE)
        if table == len(self._tables):
            self._tables.append(torch.empty(TABLE, *answer.shape, dtype=torch.float32))
        self._tables[table][at] = answer
        return number


def _row(batch: Batch, index: int) -> Batch:
    """One row of a batch, its padding cut off."""
    length = int((batch.segments_BP[index] > 0).sum())
    here = slice(index, index + 1)
    return replace(
        batch,
        ids_BP=batch.ids_BP[here, :length],
        segments_BP=batch.segments_BP[here, :length],
        positions_BP=batch.positions_BP[here, :length],
        targets_BP=batch.targets_BP[here, :length],
        types_BP=None if batch.types_BP is None else batch.types_BP[here, :length],
        rows_B=batch.rows_B[:1],
        labels_B=None,
    )
