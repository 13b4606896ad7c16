"""A plan for a model of the catalog: its newest sensitivities, measured now where there are none, and what fits a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from core.budget.plans import Plan, Sensitivity, plans
from core.registry import get
from core.types import Progress, Prompt, Run, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

PROBE = "layer_sensitivity"
QUICK = {"measure": "fisher"}
"""What is measured where nothing is stored and nothing else was asked for: minutes become seconds."""


@dataclass(frozen=True)
class Planned:
    """Plans for one model, and the run they rest on."""

    model: str
    budget: int
    run: str
    settings: Mapping[str, Any]
    """Of the sensitivities."""
    plans: tuple[Plan, ...]


def newest_sensitivity(
    catalog: Catalog, variant_id: str, settings: Mapping[str, Any] | None = None
) -> Run | None:
    """The latest finished run of the probe on a base or variant, with exactly these settings where they are given."""
    found = [
        run
        for run in catalog.runs(variant_id)
        if run.kind == "probe"
        and run.conditions.get("method") == PROBE
        and (settings is None or run.conditions["settings"] == settings)
    ]
    return max(found, key=lambda run: run.ended_at, default=None)


def plan_model(
    catalog: Catalog,
    model: str,
    budget: str,
    *,
    tolerance: str | None = None,
    settings: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Planned:
    """Up to three plans for ``budget`` (``60MB``, ``4.5bpw``); ``settings`` of the probe may be text.

    Raises ``BadInput`` for a budget, tolerance or settings that cannot be, and for a budget below the minimum.
    """
    from core.bench import probe_model
    from core.budget.assignment import read_budget
    from core.catalog.results import result_of
    from core.loop import register

    probe = get("probe", PROBE)
    read_budget(budget, 1)
    asked = None if not settings else probe.parse_text(settings).model_dump(mode="json")
    entry = register(catalog, model, progress=progress)
    run = newest_sensitivity(catalog, entry.id, asked)
    if run is None:
        run = probe_model(catalog, model, PROBE, Prompt(""), settings=asked or QUICK, progress=progress)
    table = Sensitivity.of(result_of(catalog, run.id))
    size = read_budget(budget, entry.parameters)
    made = plans(table, size, tolerance=tolerance)
    return Planned(model, size, run.id, run.conditions["settings"], made)


def summary(planned: Planned) -> list[dict[str, Any]]:
    """The plans as rows for a terminal."""
    return [
        {
            "plan": plan.kind,
            "MB": None if plan.bytes is None else plan.bytes / 1e6,
            "loss": plan.loss,
            "unit": plan.unit,
            "within": plan.within,
            "what": plan.words,
        }
        for plan in planned.plans
    ]


def document(planned: Planned) -> dict[str, Any]:
    """The same as one JSON document, each recipe as its file has it."""
    made = [
        {
            **asdict(replace(plan, recipe=None)),
            "recipe": None if plan.recipe is None else plan.recipe.model_dump(mode="json"),
        }
        for plan in planned.plans
    ]
    return {**asdict(replace(planned, plans=())), "plans": made}
