"""What a recipe will leave and take, told before it runs: bytes of the weight files, seconds and memory of its steps.

Counted from a model card and from what each step says of itself: a step that changes the structure by ``left=``, one
that stores weights otherwise by its settings' ``stored_bits``, what it takes by ``cost=``. Of a step that says nothing,
nothing is promised. Knows no torch: the dashboard asks it at every keystroke.
"""

from __future__ import annotations

from collections.abc import Mapping
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


@runtime_checkable
class KeepsBudget(Protocol):
    """Settings of a step that is told how large the result may be."""

    def budgeted_bytes(self, n_parameters: int) -> float:
        """Bytes that a model of so many parameters may take."""


def predicted_bytes(card: Counted, recipe: Recipe) -> float | None:
    """Bytes of the weight files, file headers aside; None where a step does not say, or will be refused."""
    sizes = card.components.groupby("component")["parameters"].sum().astype(float)
    bits = dict.fromkeys(sizes.index, float(WIDTH.get(card.dtype, 32)))
    budget = None
    for step in recipe.steps:
        method, stored = get("compress", step.method), step.parsed()
        left = method.left
        if "moe" in method.needs and not card.anatomy.n_experts:
            return None  # the step will be refused, or an earlier one makes the experts
        try:
            if left is not None:
                shares = left(card.anatomy, stored)
                sizes *= [float(shares.get(str(component), 1.0)) for component in sizes.index]
            if isinstance(stored, KeepsBudget):
                budget = stored.budgeted_bytes(int(sizes.sum()))
            elif isinstance(stored, StoresBits):
                bits |= {c: b for c, b in stored.stored_bits(card.anatomy).items() if c in bits}
            elif left is None:
                return None
        except SlimscopeError:
            return None  # the step will be refused, with the reason
    if budget is not None:
        return budget
    return float(sum(sizes[component] * bits[component] for component in sizes.index)) / 8


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
