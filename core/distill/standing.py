"""Where a training stands: its position in the data and the best weights seen, kept on disk and taken up again.

What a resumed training needs is here, in the weights and in the optimizer's moments, and nowhere else.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.distill.checkpoint import has_checkpoint, read_checkpoint, write_checkpoint
from core.distill.curve import NAME as CURVE
from core.distill.curve import Curve
from core.distill.held_out import HeldOut
from core.distill.optimizer import Optimizer
from core.distill.precision import Weights
from core.distill.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Position:
    """Plain values that say how far a training is."""

    update: int = 0
    rows: int = 0
    """Rows read, epoch after epoch."""
    tokens: int = 0
    """Tokens read, padding not counted."""
    measured_at: int = -1
    """Tokens at the latest measurement; -1 before the first."""
    best: float = math.inf
    """Smallest held-out value so far."""
    best_tokens: int = 0
    without_best: int = 0
    """Measurements since the best one."""
    points: int = 0
    """Length of the curve."""


@dataclass
class Standing:
    """The state of a training beside its weights and moments, and the folder it is kept in."""

    folder: Path | None
    """None where this process keeps nothing."""
    key: str
    """Hash of all that the training depends on."""
    curve: Curve
    position: Position = field(default_factory=Position)
    best: dict[str, Tensor] = field(default_factory=dict)
    before: HeldOut | None = None
    after: HeldOut | None = None
    """Of the best weights."""
    notes: list[str] = field(default_factory=list)
    kept_at: float = field(default_factory=time.monotonic)

    @property
    def is_kept(self) -> bool:
        """Whether there is a checkpoint of this training to go on from."""
        return self.folder is not None and has_checkpoint(self.folder, key=self.key)

    def offer(self, found: HeldOut, value: float, weights: Weights) -> bool:
        """Take a measurement, and the weights where it is the smallest ``value`` so far; whether it was."""
        place = self.position
        if self.before is None:
            self.before = found
        better = value < place.best
        if better:
            place.best, place.best_tokens, place.without_best = value, place.tokens, 0
            self.best, self.after = weights.copied(), found
        else:
            place.without_best += 1
        place.measured_at = place.tokens
        return better

    def point(self, kind: Any, **values: Any) -> None:
        """Add to the curve."""
        self.curve.add(kind, **values)
        self.position.points = len(self.curve.points)

    def keep(self, weights: Weights, optimizer: Optimizer) -> None:
        """Write the checkpoint; where that fails the one before stays, a note says so, and the training goes on."""
        self.kept_at = time.monotonic()
        if self.folder is None or self.before is None or self.after is None:
            return
        self.curve.flush()
        tensors = {f"weight:{name}": value for name, value in weights.exact.items()}
        tensors |= {f"moment:{name}": value for name, value in optimizer.state().items()}
        if self.position.best_tokens:  # at 0 the best are those it begins with
            tensors |= {f"best:{name}": value for name, value in self.best.items()}
        facts = {
            "position": asdict(self.position), "before": self.before.as_json(), "after": self.after.as_json(),
        }  # fmt: skip
        refused = write_checkpoint(self.folder, key=self.key, tensors=tensors, facts=facts)
        if refused:
            self.notes.append(f"A checkpoint could not be written, and the one before was kept: {refused}.")


def standing(
    folder: Path | None, key: str, weights: Weights, optimizer: Optimizer, processes: Processes
) -> Standing:
    """The folder's training taken up where it was (weights and moments too), or a new one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    found = processes.share(None if folder is None else read_checkpoint(folder, key=key))
    file = None if folder is None else folder / CURVE
    if found is None:
        return Standing(folder, key, Curve(file))
    start, position = weights.copied(), Position(**found.facts["position"])
    weights.put(_under("weight:", found.tensors))
    optimizer.restore(_under("moment:", found.tensors))
    return Standing(
        folder, key, Curve(file, keep=position.points), position, _under("best:", found.tensors) or start,
        HeldOut.of(found.facts["before"]), HeldOut.of(found.facts["after"]),
        [f"Taken up again at {position.tokens:,} tokens."],
    )  # fmt: skip


def _under(prefix: str, tensors: Any) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
