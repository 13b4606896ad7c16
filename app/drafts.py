"""The recipe being written on the Compress page: its steps in the session, its JSON in the address.

The address is the truth: a link, the back button or typed JSON replaces the steps, and every edit of a step is written
to it. What cannot be read stays as it was typed, with the reason.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace

import streamlit as st

from core.errors import BadInput
from core.recipe import Recipe, Step

FIRST = "rtn"
"""The step that a new recipe begins with."""
LONGEST = 20_000
"""Characters of a recipe that may be typed, uploaded or linked."""
ECHO_S = 2.0
"""A click that was on its way while the address changed still carries the one before; after this it is the back button."""
_KEY = "draft"


@dataclass(frozen=True)
class Draft:
    """Steps on the workbench. ``text`` is what the address holds, None while nothing was changed."""

    steps: tuple[Step, ...]
    calibration: str | None = None
    chosen: int = 0
    """The step whose form is open."""
    version: int = 0
    """Raised whenever the open form must be drawn anew from the steps."""
    text: str | None = None
    wrong: str = ""
    """Why ``text`` is no recipe; then ``steps`` are those of the last one that was."""
    before: str | None = None
    written_at: float = 0.0

    @property
    def recipe(self) -> Recipe:
        """The recipe of the steps; a text that no step reads is left out."""
        return Recipe.parse({"steps": [step.model_dump() for step in self.steps]}).calibrated_on(
            self.calibration
        )


def current() -> Draft:
    """The draft as the address and the last edits have it."""
    draft = st.session_state.get(_KEY)
    linked = st.query_params.get("recipe")
    if draft is None:
        draft = Draft(Recipe.of(FIRST).steps)
    echo = linked == draft.before and time.monotonic() - draft.written_at < ECHO_S
    if linked is not None and linked != draft.text and not echo:
        draft = _taken(draft, linked)
    elif draft.text is not None and linked != draft.text:  # an echo, or kept from another page
        st.query_params["recipe"] = draft.text
    st.session_state[_KEY] = draft
    return draft


def take(text: str) -> None:
    """Replace the draft by typed or uploaded JSON; from a callback."""
    _publish(_taken(current(), text[:LONGEST]), text[:LONGEST])


def add(method: str, *, version: int) -> None:
    """Append a step with its defaults and open its form; from a callback."""
    if draft := _as_drawn(version):
        _changed(draft, (*draft.steps, *Recipe.of(method).steps), len(draft.steps))


def duplicate(at: int, *, version: int) -> None:
    """Put a copy of a step after it; from a callback."""
    if draft := _as_drawn(version):
        _changed(draft, (*draft.steps[: at + 1], *draft.steps[at:]), at + 1)


def remove(at: int, *, version: int) -> None:
    """Take a step out, unless it is the only one; from a callback."""
    draft = _as_drawn(version)
    if draft is not None and len(draft.steps) > 1:
        _changed(draft, (*draft.steps[:at], *draft.steps[at + 1 :]), min(at, len(draft.steps) - 2))


def move(at: int, to: int, *, version: int) -> None:
    """Take a step to another place; places that are not there change nothing. From a callback."""
    draft = _as_drawn(version)
    if draft is not None and at != to and {at, to} <= set(range(len(draft.steps))):
        steps = list(draft.steps)
        steps.insert(to, steps.pop(at))
        _changed(draft, tuple(steps), to)


def _as_drawn(version: int) -> Draft | None:
    """The draft, if it is the one whose buttons were drawn.

    A run that another one interrupts is given its click again, and so may be its callback: what was done is not done twice.
    """
    draft = current()
    return draft if draft.version == version else None


def choose(at: int) -> None:
    """Open the form of a step; from a callback."""
    draft = current()
    if at != draft.chosen and 0 <= at < len(draft.steps):
        st.session_state[_KEY] = replace(draft, chosen=at, version=draft.version + 1)


def edited(draft: Draft, step: Step, calibration: str | None) -> Draft:
    """The draft with what its open form says now; the address follows."""
    steps = (*draft.steps[: draft.chosen], step, *draft.steps[draft.chosen + 1 :])
    if (steps, calibration) == (draft.steps, draft.calibration):
        return draft
    new = replace(draft, steps=steps, calibration=calibration)
    return _publish(new, new.recipe.canonical())


def use(recipe: Recipe) -> None:
    """Put a whole recipe on the workbench; from a callback."""
    take(recipe.canonical())


def _changed(draft: Draft, steps: tuple[Step, ...], chosen: int) -> None:
    new = replace(draft, steps=steps, chosen=chosen, version=draft.version + 1, wrong="")
    _publish(new, new.recipe.canonical())


def _publish(draft: Draft, text: str) -> Draft:
    before = st.query_params.get("recipe")
    new = replace(draft, text=text, before=before, written_at=time.monotonic())
    st.query_params["recipe"] = text
    st.session_state[_KEY] = new
    return new


def _taken(draft: Draft, text: str) -> Draft:
    """The draft that a text means, or the old one with the reason why it means none."""
    try:
        recipe = Recipe.parse(json.loads(text))
    except (ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, BadInput) else f"This is not JSON: {error}"
        return replace(draft, text=text, wrong=said)
    chosen = min(draft.chosen, len(recipe.steps) - 1)
    return replace(
        draft, steps=recipe.steps, calibration=recipe.calibration, chosen=chosen, text=text, wrong="",
        version=draft.version + 1,
    )  # fmt: skip
