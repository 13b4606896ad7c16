"""Recipes that end with a training: from a template, or from the shape a student is to have.

The page draws the templates, the command line names them; both get the same recipe. Knows no model but its number of
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import BadInput
from core.recipe import Recipe
from core.registry import get

Steps = list[tuple[str, dict[str, Any]]]
LOW_BITS = {"group_size": "32", "scheme": "symmetric"}
"""Rounding before a training of scales: small groups, no zero point to learn."""


@dataclass(frozen=True)
class Template:
    """A student and how it learns, for a model of so many layers."""

    id: str
    title: str
    sentence: str
    steps: Callable[[int], Steps]

    def recipe(self, n_layers: int, training: Mapping[str, Any] | None = None) -> Recipe:
        """The whole recipe, defaults filled in; ``training`` overrides settings of the last step."""
        *before, (method, settings) = self.steps(n_layers)
        return recipe_of([*before, (method, {**settings, **(training or {})})])


@dataclass(frozen=True)
class Shape:
    """What a student keeps of the model it starts from; what is None stays as it is."""

    layers: int | None = None
    criterion: str = "even"
    width: float | None = None
    """Share of every MLP's neurons that is left."""
    bits: int | None = None
    model: str | None = None
    """Instead of all that: an existing model."""
    steps: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """Further steps, before rounding."""

    def before(self, n_layers: int) -> Steps:
        """The steps that make the student. Raises ``BadInput`` for a shape that is larger, or said twice."""
        found: Steps = []
        if self.model is not None:
            if self.layers or self.width or self.bits:
                raise BadInput("an existing student has its own shape; leave layers, width and bits out")
            found.append(("own_student", {"model": self.model}))
        if self.layers is not None:
            if not 0 < self.layers < n_layers:
                raise BadInput(
                    f"{self.layers} layers are no smaller student of {n_layers}; take 1 to {n_layers - 1}"
                )
            found.append(("drop_layers", dropping(n_layers, self.layers, self.criterion)))
        if self.width is not None:
            found.append(("prune_width", {"part": "ffn", "share": round(1 - self.width, 6)}))
        found += [(method, dict(settings)) for method, settings in self.steps]
        if self.bits is not None:
            found.append(("gptq", {"bits": self.bits, **LOW_BITS}))
        return found


def distilled(shape: Shape, n_layers: int, training: Mapping[str, Any]) -> Recipe:
    """The shape's steps, then ``distil``; where the student was rounded, scales and norms learn unless told otherwise."""
    moves = {"train": "scales_and_norms"} if shape.bits is not None else {}
    return recipe_of([*shape.before(n_layers), ("distil", {**moves, **training})])


def recipe_of(steps: Sequence[tuple[str, Mapping[str, Any]]]) -> Recipe:
    """A recipe of these steps, validated."""
    return Recipe.parse(
        {"steps": [{"method": method, "settings": dict(settings)} for method, settings in steps]}
    )


def template_of(id_: str) -> Template:
    """One template; raises ``BadInput`` listing all."""
    known = {template.id: template for template in TEMPLATES}
    if id_ not in known:
        raise BadInput(f"no template is called {id_!r}; there are: {', '.join(known)}")
    return known[id_]


def dropping(n_layers: int, kept: int, criterion: str = "even") -> dict[str, Any]:
    """Settings of ``drop_layers`` that leave so many; a student of one layer cannot keep both ends."""
    return {"count": n_layers - kept, "criterion": criterion, "keep_ends": kept >= 2}


def parsed_step(text: str) -> tuple[str, dict[str, Any]]:
    """``METHOD`` or ``METHOD:key=value,key=value`` as a step's method and settings; raises ``BadInput``."""
    method, _, rest = text.partition(":")
    words = [word for word in rest.split(",") if word]
    if any("=" not in word for word in words):
        raise BadInput(
            f"step {text!r} is not understood; write METHOD:key=value,key=value, e.g. prune_width:share=0.5"
        )
    settings = get("compress", method).parse_text(dict(word.split("=", 1) for word in words))
    return method, settings.model_dump(mode="json")


def _shallow(left: float) -> Callable[[int], Steps]:
    def steps(n: int) -> Steps:
        kept = min(max(1, round(n * left)), max(1, n - 1))
        return [("drop_layers", dropping(n, kept)), ("distil", {})]

    return steps


TEMPLATES = (
    Template(
        "half",
        "Half the layers",
        "Every second layer of the teacher, trained to say what all of them say.",
        _shallow(1 / 2),
    ),
    Template(
        "two_thirds",
        "Two thirds",
        "Two of three layers: less is lost before training, less is won after it.",
        _shallow(2 / 3),
    ),
    Template(
        "narrow",
        "Narrow MLPs",
        "All layers, half the neurons: those that write least to the stream go.",
        lambda _: [("prune_width", {"part": "ffn", "share": 0.5}), ("distil", {})],
    ),
    Template(
        "recover",
        "Recover after 3 bits",
        "GPTQ at 3 bits; then scales and norms learn from the original, codes stay.",
        lambda _: [
            ("gptq", {"bits": 3, **LOW_BITS}),
            ("distil", {"train": "scales_and_norms", "max_tokens": 300_000}),
        ],
    ),
    Template(
        "dense",
        "Experts to dense",
        "The best experts side by side, no router; training makes up for the routing.",
        lambda _: [("densify", {}), ("distil", {})],
    ),
    Template(
        "task",
        "Teacher of a task",
        "Labelled rows give the model a head first; its students are made from what this leaves.",
        lambda _: [("fine_tune", {"data": "builtin:language", "learning_rate": 5e-5})],
    ),
)
