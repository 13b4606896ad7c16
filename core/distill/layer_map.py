"""Which block of the teacher teaches which block of the student.

Every student block has a *twin*: the teacher's block it was taken from, or that stands at the same share of the depth.
What happens inside a block (attention, routing, experts) is compared with the twin. The residual stream is compared
later in the teacher: block s + 1 was made to read what its own twin reads, so student block s must do the work of all
teacher blocks from its twin up to the one before the next twin (``outputs``). For equal depths both are the same block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from core.errors import BadInput
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.sizes import block_of
from core.reshape.depth import evenly

if TYPE_CHECKING:
    from torch import Tensor

How = Literal["taken", "even", "last", "listed"]
ALIKE = 0.8
"""Relative distance of two blocks' weights below which one was made from the other: rounding to 2 bits moves a weight by
about half of its norm; zeros, and new random weights, differ by 1 or more."""


@dataclass(frozen=True)
class LayerMap:
    """Twins of all student blocks, ascending, counted from 0."""

    twins: tuple[int, ...]
    n_teacher: int
    how: How

    def __post_init__(self) -> None:
        assert self.twins, "a model has a block"
        if not all(0 <= twin < self.n_teacher for twin in self.twins):
            raise BadInput(
                f"layer map {list(self.twins)}: the teacher has blocks 0 to {self.n_teacher - 1}; name only those"
            )
        if any(later < earlier for earlier, later in itertools.pairwise(self.twins)):
            raise BadInput(
                f"layer map {list(self.twins)}: a later block cannot learn from an earlier one than the block before it; "
                "list the teacher's blocks in ascending order"
            )

    @property
    def n_student(self) -> int:
        """Blocks of the student."""
        return len(self.twins)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Per student block, the teacher block after which the residual stream should be the same."""
        nexts = (*self.twins[1:], self.n_teacher)
        return tuple(max(twin, after - 1) for twin, after in zip(self.twins, nexts, strict=True))

    def frame(self) -> pd.DataFrame:
        """One row per student block: its twin, and the teacher block whose output is its target."""
        return pd.DataFrame({"student": range(self.n_student), "twin": self.twins, "target": self.outputs})

    @classmethod
    def even(cls, n_student: int, n_teacher: int) -> LayerMap:
        """First to first, last to last, evenly between: twins round(linspace(0, L − 1, L'))."""
        return cls(evenly(n_student, n_teacher), n_teacher, "even")

    @classmethod
    def last(cls, n_student: int, n_teacher: int) -> LayerMap:
        """The teacher's last L' blocks."""
        _refuse_deeper(n_student, n_teacher)
        return cls(tuple(range(n_teacher - n_student, n_teacher)), n_teacher, "last")

    @classmethod
    def listed(cls, text: str, n_student: int, n_teacher: int) -> LayerMap:
        """Twins written out, ``0, 2, 5`` or ``0:0, 1:2, 2:5``; raises ``BadInput`` where a student block has none."""
        words = text.replace(",", " ").split()
        pairs = [word.split(":") if ":" in word else [str(place), word] for place, word in enumerate(words)]
        named = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
        twins = [named.get(str(block), "") for block in range(n_student)]
        if len(words) != n_student or not all(twin.isdecimal() for twin in twins):
            raise BadInput(
                f"layer map {text!r}: name one block of the teacher (0 to {n_teacher - 1}) for each of the student's "
                f"{n_student} blocks, e.g. {', '.join(map(str, evenly(n_student, n_teacher)))}; or say auto, even or last"
            )
        return cls(tuple(map(int, twins)), n_teacher, "listed")


def layer_map(text: str, student: LoadedModel, teacher: LoadedModel) -> LayerMap:
    """The map a setting asks for: ``auto``, ``even``, ``last``, or blocks of the teacher by number.

    ``auto`` looks in the weights for the blocks the student was taken from, and is ``even`` where there are none.
    """
    n_student, n_teacher = student.anatomy.n_layers, teacher.anatomy.n_layers
    if text == "even":
        return LayerMap.even(n_student, n_teacher)
    if text == "last":
        return LayerMap.last(n_student, n_teacher)
    if text != "auto":
        return LayerMap.listed(text, n_student, n_teacher)
    found = taken_from(student, teacher)
    return LayerMap.even(n_student, n_teacher) if found is None else LayerMap(found, n_teacher, "taken")


def taken_from(student: LoadedModel, teacher: LoadedModel) -> tuple[int, ...] | None:
    """The teacher's blocks that the student's were made from, seen from their weights; None where they were not.

    Holds through rounding, and through cuts that leave one matrix of the block whole. Costs one pass over one matrix
    of every block.
    """
    ours, theirs = _matrices(student), _matrices(teacher)
    found: list[int] = []
    with torch.no_grad():
        for mine in ours:
            start = found[-1] + 1 if found else 0
            far = {place: _distance(mine, theirs[place]) for place in range(start, len(theirs))}
            if not far or min(far.values()) > ALIKE:
                return None
            found.append(min(far, key=lambda place: far[place]))
    return tuple(found)


def _matrices(loaded: LoadedModel) -> list[dict[str, Tensor]]:
    """Per block its matrices by their names inside the block."""
    found: list[dict[str, Any]] = [{} for _ in loaded.anatomy.blocks]
    for name, parameter in loaded.model.named_parameters():
        block = block_of(loaded.anatomy, name)
        if block is not None and parameter.ndim >= 2:
            found[block.index][name.removeprefix(block.path)] = parameter.data
    return found


def _distance(mine: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖a − b‖ / ‖b‖ of the first matrix that both blocks have in one shape; infinite where there is none."""
    for name, weight in mine.items():
        twin = other.get(name)
        if twin is not None and twin.shape == weight.shape:
            reference = twin.float()
            return float((weight.float() - reference).norm() / reference.norm())
    return float("inf")


def _refuse_deeper(n_student: int, n_teacher: int) -> None:
    if n_student > n_teacher:
        raise BadInput(
            f"a student of {n_student} blocks has no {n_student} last blocks in a teacher of {n_teacher}; choose layer map "
            "even"
        )
