"""What a student is trained towards, as the trainer sees it: sums over a batch, and what to measure on held-out rows.

``language_objective.py``, ``classification_objective.py`` and ``similarity_objective.py`` are the three there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch


@dataclass(frozen=True, eq=False)
class Parts:
    """A batch's loss and what it is made of."""

    loss: Tensor
    """Sum over the batch's targets, in nats, weighted; to be differentiated once."""
    n: int
    """Targets: next tokens, labels or scored pairs."""
    parts: Mapping[str, float]
    """Each part's own sum, without its weight: ``kd``, ``task``, and the losses on what goes on inside."""


class Objective(Protocol):
    """One training's aim. It holds student and teacher; the trainer holds their locks."""

    chosen_by: str
    """The held-out measure, lower better, by which the best weights are chosen."""

    def __call__(self, batch: Batch) -> Parts:
        """The loss of a batch, differentiable in the student. What it draws comes from torch's own generator."""

    def held_out(self, batch: Batch) -> dict[str, float]:
        """Sums over the batch's targets of everything worth a curve; call it without gradients."""

    def learned(self) -> list[tuple[str, Any]]:
        """Parameters that are learned with the student and thrown away afterwards (projections), by name."""
