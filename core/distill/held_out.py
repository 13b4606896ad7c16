"""Measuring a student on rows it never learns from: sums by row, so that before and after can be compared row by row.

Legend: R rows. Knows no update and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.corpus.batches import order
from core.lazy import torch

if TYPE_CHECKING:
    from core.corpus.batches import TrainingData
    from core.distill.objective import Objective
    from core.distill.processes import Processes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeldOut:
    """What was measured, by row."""

    n_R: Floats
    """Targets of each row: tokens, labels or scores."""
    sums: Mapping[str, Floats]
    """Measure → [R] sums over the row's targets."""

    @property
    def n(self) -> int:
        """All targets."""
        return int(self.n_R.sum())

    def mean(self, measure: str) -> float:
        """Mean over all targets."""
        return float(self.sums[measure].sum() / self.n_R.sum())

    @property
    def means(self) -> dict[str, float]:
        """Every measure's mean."""
        return {measure: self.mean(measure) for measure in self.sums}

    def as_json(self) -> dict[str, Any]:
        """Plain lists; ``of`` is the inverse."""
        return {
            "n": self.n_R.tolist(),
            "sums": {measure: sums_R.tolist() for measure, sums_R in self.sums.items()},
        }

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> HeldOut:
        """From ``as_json``."""
        return cls(np.array(value["n"]), {name: np.array(sums) for name, sums in value["sums"].items()})


def chosen_rows(data: TrainingData, *, max_tokens: int, seed: int) -> list[int]:
    """Rows that have targets, up to ``max_tokens`` tokens of them, and one at least; drawn by ``seed``, in their order.

    The first ones would be a sample of nothing: files come sorted by label, and packed rows by their longest text.
    """
    chosen: list[int] = []
    tokens = 0
    for row in order(data.n_rows, 0, seed).tolist():
        batch = data.batch([row])
        if chosen and tokens + batch.n_tokens > max_tokens:
            break
        if n_targets(batch):
            chosen.append(row)
            tokens += batch.n_tokens
    return sorted(chosen)


def n_targets(batch: Any) -> int:
    """Over how many things a batch's loss is a sum: labels or scores where it has them, else tokens."""
    return int(batch.n_targets) if batch.labels_B is None else len(batch.labels_B)


def measure(
    objective: Objective,
    data: TrainingData,
    rows: Sequence[int],
    processes: Processes,
    tick: Callable[[int], None],
) -> HeldOut:
    """Every measure of the objective on each of these rows; ``tick`` is told how many are done."""
    found: dict[int, tuple[int, dict[str, float]]] = {}
    with torch.no_grad():
        for place, row in processes.mine(rows):
            tick(place)
            batch = data.batch([row])
            found[place] = n_targets(batch), objective.held_out(batch)
    names = sorted(next(iter(found.values()))[1]) if found else []
    names = processes.share(names)
    table = np.zeros((len(rows), 1 + len(names)))
    for place, (n, sums) in found.items():
        table[place] = [n, *(sums[name] for name in names)]
    whole = np.array(processes.sums(table.ravel().tolist())).reshape(table.shape)
    return HeldOut(whole[:, 0], {name: whole[:, index] for index, name in enumerate(names, 1)})
