"""What a recipe will leave and take, told before it runs: bytes of the weight files, seconds and memory of its steps.

Counted from a model card and from what each step says of itself: a step that changes the structure by ``left=``, one
that stores weights otherwise by its settings' ``stored_bits``, what it takes by ``cost=``. Of a step that says nothing,
nothing is promised. Knows no torch: the dashboard asks it at every keystroke.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from core.errors import SlimscopeError
from core.estimate import estimate
from core.models.anatomy import Anatomy
from core.recipe import Recipe, Step
from core.registry import get

if TYPE_CHECKING:
    import pandas as pd

    from core.models.sizes import ModelCard

SAMPLE_TOKENS = 512
"""Tokens of one calibration window where the step's settings name none."""
NARROW = 15.0
"""Bits per value below which weights are packed: codes, scales and shapes beside them."""
LINE = 90
"""Bytes of a tensor's line in a safetensors header beside its module's name: dtype, shape, offsets."""
LINE = 90
"""Bytes of a tensor's line in a safetensors header beside its module's name: dtype, shape, offsets."""
WIDTH = {"float32": 32, "bfloat16": 16, "float16": 16}


@runtime_checkable
class StoresBits(Protocol):
    """Settings that say how their step stores weights."""

    def stored_bits(self, anatomy: Anatomy) -> Mapping[str, float]:
        """Component → bits per value in the file, scales included; what is not named stays as it is."""


class Counted(Protocol):
    """What sizes are counted from: a model card, or less."""

    @property
    def anatomy(self) -> Anatomy:
        """Of the model."""

    @property
    def dtype(self) -> str:
        """What it is held in."""

    @property
    def components(self) -> pd.DataFrame:
        """``core.models.sizes.component_sizes``."""

    @property
    def file_bytes(self) -> int:
        """Of the weight files it was opened from."""


@runtime_checkable
class KeepsBudget(Protocol):
    """Settings of a step that is told how large the result may be."""

    def budgeted_bytes(self, n_parameters: int) -> float:
        """Bytes that a model of so many parameters may take."""


@dataclass(frozen=True)
class Parts:
    """What a recipe leaves of each component, by its name."""

    before: dict[str, float]
    """Numbers as the model has them, tied ones once."""
    left: dict[str, float]
    bits: dict[str, float]
    """Per number in the file."""
    header: dict[str, float]
    """Bytes of the header lines of packed weights, as if none were left out."""
    budget: float | None
    """Bytes of all together, where a step keeps to so many."""

    @property
    def bytes(self) -> float:
        """Of the weight files, header included."""
        if self.budget is not None:
            return self.budget
        values = sum(self.left[component] * self.bits[component] for component in self.left) / 8
        return values + sum(n * self.left[c] / self.before[c] for c, n in self.header.items())


def predicted_bytes(card: Counted, recipe: Recipe) -> float | None:
    """Bytes of the weight files, header included; None where a step does not say, or will be refused."""
    parts = predicted_parts(card, recipe.steps)
    return None if parts is None else parts.bytes


def predicted_parts(card: Counted, steps: Iterable[Step]) -> Parts | None:
    """What steps leave of every component; None where one does not say, or will be refused.

    What no step stores otherwise stays as wide as it is on average in the file that was opened: a variant is written in
    its base's own precision.
    """
    sizes = card.components.groupby("component")["parameters"].sum().astype(float)
    before = {str(component): float(n) for component, n in sizes.items()}
    width = min(8 * card.file_bytes / sum(before.values()), float(WIDTH.get(card.dtype, 32)))
    left, bits, budget = dict(before), dict.fromkeys(before, width), None
    for step in steps:
        method = get("compress", step.method)
        changes, stored = method.left, step.parsed()
        if "moe" in method.needs and not card.anatomy.n_experts:
            return None  # the step will be refused, or an earlier one makes the experts
        try:
            if changes is not None:
                shares = changes(card.anatomy, stored)
                left = {component: n * float(shares.get(component, 1.0)) for component, n in left.items()}
            if isinstance(stored, KeepsBudget):
                budget = stored.budgeted_bytes(int(sum(left.values())))
            elif isinstance(stored, StoresBits):
                bits |= {c: b for c, b in stored.stored_bits(card.anatomy).items() if c in bits}
            elif changes is None:
                return None
        except SlimscopeError:
            return None  # the step will be refused, with the reason
    packed = {component for component in before if bits[component] < min(width, NARROW)}
    return Parts(before, left, bits, _header_bytes(card, packed), budget)


def _header_bytes(card: Counted, packed: set[str]) -> dict[str, float]:
    """Component → bytes of its header lines: one each for codes, scales and shape of every packed matrix."""
    found = {}
    for component, rows in card.components[card.components["component"].isin(packed)].groupby("component"):
        lines = sum(LINE + len(str(module)) for module in rows["module"])
        matrices = 3 * card.anatomy.n_experts if component == "experts" else 1  # gate, up and down of each
        found[str(component)] = 3.0 * matrices * lines
    return found


@dataclass(frozen=True)
class Work:
    """What the steps of a recipe take; the proof, the evaluation and the profile come after them."""

    seconds: float | None
    """Of the steps that say what they take; None where none does."""
    peak_bytes: int | None
    """The model and the largest need beside it; None where a step does not say."""
    untold: tuple[str, ...]
    """Methods that do not say what they take."""


def predicted_work(card: ModelCard, recipe: Recipe) -> Work:
    """Seconds and peak memory of a recipe's steps at the model's pace on this machine; what was pruned counts whole.

    A step that reads no text and says nothing takes about one forward pass, as the registry has it; its memory is not told.
    """
    seconds, extra, untold = 0.0, 0, list[str]()
    told, measured = False, True
    for step in recipe.steps:
        method = get("compress", step.method)
        if card.pace is None or (method.cost is None and "calibration" in method.needs):
            untold.append(step.method)
            continue
        measured &= method.cost is not None
        try:
            found = estimate(method, card.anatomy, card.pace, _window(card, step), step.parsed())
        except SlimscopeError:
            untold.append(step.method)  # it will be refused, with the reason
            continue
        told = True
        seconds += found.seconds
        extra = max(extra, found.extra_bytes)
    return Work(
        seconds if told else None, card.bytes + extra if measured and not untold else None, tuple(untold)
    )


def _window(card: ModelCard, step: Step) -> int:
    return min(int(step.settings.get("sample_tokens", SAMPLE_TOKENS)), card.anatomy.context_length)
