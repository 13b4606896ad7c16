"""Students worth one click: each a recipe that ends with a training, made to the measure of the model that is open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.distil_views import training_index
from core.models.sizes import ModelCard
from core.recipe import Recipe
from core.registry import methods

HEADS = ("ForSequenceClassification",)
"""Ends of the names of architectures that have a task already."""


@dataclass(frozen=True)
class Template:
    """A student and how it learns, for a model of so many layers."""

    id: str
    title: str
    sentence: str
    steps: Callable[[int], list[tuple[str, dict[str, Any]]]]
    """Steps for a model of so many layers."""

    def recipe(self, card: ModelCard) -> Recipe:
        """The whole recipe for a model, defaults filled in."""
        steps = [{"method": id_, "settings": settings} for id_, settings in self.steps(card.anatomy.n_layers)]
        return Recipe.parse({"steps": steps})


def _shallow(left: float) -> Callable[[int], list[tuple[str, dict[str, Any]]]]:
    def steps(n: int) -> list[tuple[str, dict[str, Any]]]:
        kept = max(1, round(n * left))
        dropped = {"count": max(1, n - kept), "criterion": "even", "keep_ends": n - kept <= n - 2}
        return [("drop_layers", dropped), ("distil", {})]

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
            ("gptq", {"bits": 3, "group_size": "32", "scheme": "symmetric"}),
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


def fitting(card: ModelCard) -> list[Template]:
    """The templates that a model can have: their steps are known, apply to it, and it has no task yet where they give one."""
    known = methods("compress")
    found: list[Template] = []
    for template in TEMPLATES:
        used = [known.get(id_) for id_, _ in template.steps(card.anatomy.n_layers)]
        if any(method is None or method.needs - {"calibration"} - card.offers for method in used):
            continue
        if template.id == "task" and card.anatomy.architecture.endswith(HEADS):
            continue
        if template.id == "narrow" and card.anatomy.n_experts:
            continue  # the neurons are the experts'
        recipe = template.recipe(card)
        found += [template] if recipe not in [other.recipe(card) for other in found] else []
    return found


def chosen(card: ModelCard, recipe: Recipe) -> str | None:
    """The template whose student a recipe trains, however it trains it; None where it is another student."""
    before = recipe.steps[: training_index(recipe)]
    same = (t.id for t in fitting(card) if _student(t.recipe(card)) == before)
    return next(same, None)


def _student(recipe: Recipe) -> tuple[object, ...]:
    return recipe.steps[: training_index(recipe)]
