"""Which model each step of a recipe looks back to: the base it is kept close to, or the teacher it learns from."""

from __future__ import annotations

from typing import Literal

from core.recipe import Recipe, Step
from core.registry import get

Whose = Literal["base", "start"]
"""``base``: the root that all variants are compared with; ``start``: the model the recipe starts from, as it was opened."""


def references_of(recipe: Recipe) -> dict[int, Whose | str]:
    """For each step that looks at a second model, by its number from 0: which one, ``Whose`` or a model's syntax.

    A step with the setting ``teacher`` may name it. Left at ``auto``, a step behind others learns from the model that
    those changed, and a step that comes first (which recovers what was lost before) from the base.
    """
    return {
        index: _of(step, first=index == 0)
        for index, step in enumerate(recipe.steps)
        if get("compress", step.method).takes_reference
    }


def _of(step: Step, *, first: bool) -> Whose | str:
    teacher = getattr(step.parsed(), "teacher", None)
    if teacher is None:
        return "base"
    if teacher == "auto":
        return "base" if first else "start"
    return str(teacher)
