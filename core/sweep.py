"""One step of a recipe with several values of its settings: which variants that means, and making them one after another.

Every combination is a whole recipe of its own, so a swept variant has the id it would have if it were asked for alone:
what was made and proven before is found, not made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.errors import BadInput, Cancelled, SlimscopeError
from core.loop import compare, evaluate_variant, make_variant, profile_variant, register
from core.prediction import predicted_bytes
from core.recipe import Recipe, Step
from core.registry import get
from core.types import Progress, part_of

if TYPE_CHECKING:
    from core.catalog.store import Catalog
    from core.models.sizes import ModelCard

MOST = 48
"""Variants of one sweep: so many, each evaluated and profiled, are a night's work on a small machine."""


def combinations(recipe: Recipe, over: Mapping[str, Sequence[str]], *, step: int = 0) -> list[Recipe]:
    """The recipe with every combination of values (as text) for settings of its step number ``step``, without repeats.

    The last setting changes fastest. Raises ``BadInput`` for a step or setting that is not there, a value the method
    refuses, no value at all, and more than ``MOST`` variants.
    """
    if not 0 <= step < len(recipe.steps):
        raise BadInput(f"step {step + 1} is not in the recipe, which has {len(recipe.steps)}")
    method = get("compress", recipe.steps[step].method)
    _refuse_unsweepable(over, method.id, list(method.settings.model_fields))
    found: dict[str, Recipe] = {}
    for values in product(*over.values()):
        chosen = method.parse_text(dict(zip(over, values, strict=True))).model_dump(mode="json")
        settings = recipe.steps[step].settings | {name: chosen[name] for name in over}
        steps = [*recipe.steps[:step], Step(method=method.id, settings=settings), *recipe.steps[step + 1 :]]
        whole = {**recipe.model_dump(mode="json"), "steps": [s.model_dump() for s in steps]}
        parsed = Recipe.parse(whole)
        found.setdefault(parsed.hash, parsed)
    return list(found.values())


def values_of(text: str) -> list[str]:
    """Values as they are typed: ``2, 3,4`` is three."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _refuse_unsweepable(over: Mapping[str, Sequence[str]], method: str, known: Sequence[str]) -> None:
    unknown = [name for name in over if name not in known]
    if unknown:
        raise BadInput(f"{method} has no setting {unknown[0]!r}; there are: {', '.join(known)}")
    empty = [name for name, values in over.items() if not values]
    if empty or not over:
        raise BadInput(
            f"a sweep needs values for {empty[0] if empty else 'at least one setting'}, e.g. bits=2,3,4,8"
        )
    n = 1
    for values in over.values():
        n *= len(values)
    if n > MOST:
        raise BadInput(f"{n} variants are more than the {MOST} of one sweep; give fewer values")


def planned(catalog: Catalog, card: ModelCard, recipes: Sequence[Recipe]) -> pd.DataFrame:
    """What making the recipes of this model would give: variant, name, predicted_bytes (missing where a step does not say),
    made (it is in the catalog, with its reload proof)."""
    rows = []
    for recipe in recipes:
        id_ = recipe.variant_id(card.fingerprint)
        rows.append((id_, recipe.label(), predicted_bytes(card, recipe), _is_proven(catalog, id_)))
    return pd.DataFrame(rows, columns=["variant", "name", "predicted_bytes", "made"])


def _is_proven(catalog: Catalog, id_: str) -> bool:
    try:
        return catalog.variant(id_).proven
    except BadInput:  # never made
        return False


@dataclass(frozen=True)
class Measuring:
    """How every variant of a sweep is measured."""

    documents: str = "pydoc"
    evaluate: Mapping[str, Any] | None = None
    profile: Mapping[str, Any] | None = None


def run_sweep(
    catalog: Catalog, model: str, recipes: Sequence[Recipe], measuring: Measuring, *, progress: Progress
) -> pd.DataFrame:
    """Make, prove, evaluate and profile each recipe's variant, and the base; one row each as ``compare`` has them.

    What was measured before is not measured again. A variant that cannot be made keeps its row, with the reason in
    ``failed``, and the others go on; raises its error where none could be made.
    """
    base = register(catalog, model, progress=progress)
    made, failed = {}, []
    for number, recipe in enumerate(recipes):
        part = part_of(progress, number / len(recipes), (number + 1) / len(recipes))
        try:
            found = make_variant(catalog, model, recipe, progress=part)
            for id_ in (found.variant.base_id, found.variant.id):
                _measure(catalog, id_, measuring, part)
            made[found.variant.id] = recipe
        except Cancelled:
            raise
        except SlimscopeError as error:
            failed.append((recipe, error))
    if failed and not made:
        raise failed[0][1]
    rows = compare(catalog, base=base.base_id)
    lost = pd.DataFrame([{"name": recipe.label(), "failed": str(error)} for recipe, error in failed])
    kept = rows[rows["variant"].isin([base.base_id, *made])]
    return pd.concat([kept, lost], ignore_index=True) if failed else kept


def _measure(catalog: Catalog, variant: str, measuring: Measuring, progress: Progress) -> None:
    done = {run.kind for run in catalog.runs(variant)}
    if "evaluate" not in done:
        evaluate_variant(
            catalog, variant, documents=measuring.documents, settings=measuring.evaluate, progress=progress
        )
    if "profile" not in done:
        profile_variant(catalog, variant, settings=measuring.profile, progress=progress)
