"""Which templates of students the model that is open can have, and which one a recipe came from."""

from __future__ import annotations

from app.distil_views import training_index
from core.models.sizes import ModelCard
from core.recipe import Recipe
from core.registry import methods
from core.student_recipes import TEMPLATES, Template

HEADS = ("ForSequenceClassification",)
"""Ends of the names of architectures that have a task already."""


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
        recipe = template.recipe(card.anatomy.n_layers)
        found += [template] if recipe not in [other.recipe(card.anatomy.n_layers) for other in found] else []
    return found


def chosen(card: ModelCard, recipe: Recipe) -> str | None:
    """The template whose student a recipe trains, however it trains it; None where it is another student."""
    before = recipe.steps[: training_index(recipe)]
    same = (t.id for t in fitting(card) if _student(t.recipe(card.anatomy.n_layers)) == before)
    return next(same, None)


def _student(recipe: Recipe) -> tuple[object, ...]:
    return recipe.steps[: training_index(recipe)]
