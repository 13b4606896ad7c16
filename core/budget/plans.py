"""Ways to fit a model into a budget of bytes: up to three plans, each with what it is predicted to weigh and to cost.

Quantize; drop layers and quantize the rest; or hand over to distillation, which says how large a student fits. Plans are
made from a stored table of sensitivities (the probe ``layer_sensitivity``): nothing runs, so that a page may plan at every
move of a slider. Losses of parts are taken to add up, which the table itself checks for one format at a time. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

from core.budget.allocation import Allocation, OverBudget
from core.budget.assignment import Score, allocate_readable, read_tolerance, written
from core.budget.formats import KEEP
from core.errors import BadInput
from core.recipe import Recipe
from core.types import Result

MOST_DROPPED = 1 / 3
"""Share of the layers that a plan drops at most: beyond it summed losses say nothing."""
STUDENT_BITS = 4.5
"""A student is counted in the format nearest to so many bits per value: it is trained to live with it."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What plans are made from; of a result of the probe ``layer_sensitivity``."""

    cells: pd.DataFrame
    """One row per group and format; see ``core.budget.sensitivity.table``."""
    drops: pd.DataFrame
    """One row per layer: the loss without it."""
    fixed_bytes: int
    score: Score
    unit: str
    """Of losses: nats, or 1 - cosine."""
    bytes_per_token: float | None
    """Of the text it was measured on; None for an encoder."""
    text: str
    """Calibration text, as a recipe names it."""

    @classmethod
    def of(cls, result: Result) -> Sensitivity:
        """Of a result, fresh or stored. Raises ``BadInput`` for another probe's."""
        if result.provenance.method != "layer_sensitivity":
            raise BadInput(
                f"a plan is made from layer_sensitivity, not from {result.provenance.method}; run that probe first"
            )
        facts = result.provenance.conditions
        return cls(
            result.frames["cells"],
            result.frames["drops"],
            int(facts["fixed_bytes"]),
            "exact" if result.frames["cells"]["loss"].notna().any() else "fisher",
            str(facts["loss_unit"]),
            facts["bytes_per_token"],
            str(facts["text"]),
        )

    @property
    def parameters(self) -> int:
        """Of all groups."""
        return int(self.cells.drop_duplicates("group")["parameters"].sum())

    def allocate(self, budget: int, pins: Mapping[str, str] | None = None) -> Allocation:
        """The best assignment in ``budget`` bytes. Raises ``OverBudget``, and ``BadInput`` for pins that cannot be."""
        return allocate_readable(
            self.cells, budget, fixed_bytes=self.fixed_bytes, score=self.score, pins=pins
        )


@dataclass(frozen=True)
class Plan:
    """One way to the budget."""

    kind: Literal["quantize", "prune and quantize", "distil"]
    words: str
    recipe: Recipe | None
    """None where what it needs does not exist yet."""
    bytes: int | None
    """Predicted."""
    loss: float | None
    """Predicted, in the table's unit; None where nothing can be said."""
    unit: str
    within: bool | None
    """Whether the loss keeps the tolerance; None without one, or without a loss."""
    assignment: Mapping[str, str] = field(default_factory=dict)


def plans(
    table: Sensitivity, budget: int, *, tolerance: str | None = None, pins: Mapping[str, str] | None = None
) -> tuple[Plan, ...]:
    """Up to three plans, the cheapest to run first; one that cannot be is left out.

    ``tolerance`` is a loss in the table's unit, or ``0.05bpb``: bits per byte more. Raises ``OverBudget`` where not even a
    student fits, ``BadInput`` for a tolerance or pins that cannot be.
    """
    most = None if tolerance is None else read_tolerance(tolerance, table.unit, table.bytes_per_token)
    refusal: OverBudget | None = None
    found: list[Plan] = []
    try:
        found.append(_quantize(table, table.allocate(budget, pins), most))
    except OverBudget as error:
        refusal = error
    pruned = _prune(table, budget, pins or {}, most)
    distilled = _distil(table, budget)
    found += [plan for plan in (pruned, distilled) if plan is not None]
    if not found:
        assert refusal is not None, "a model that fits needs no further plan"
        raise refusal
    return tuple(found)


def _quantize(table: Sensitivity, best: Allocation, most: float | None) -> Plan:
    recipe = _mixed(table, best)
    words = f"Store every part in the format that costs least in all: {_shares(table.cells, best.choice_of)}."
    return _plan("quantize", words, recipe, best, 0.0, table, most)


def _prune(table: Sensitivity, budget: int, pins: Mapping[str, str], most: float | None) -> Plan | None:
    """Drop the layers that cost least alone, as many as leave the smallest summed loss, and quantize what stays."""
    order = table.drops.sort_values("loss", kind="stable")
    pinned = {table.cells.loc[table.cells["group"] == group, "layer"].iloc[0] for group in pins}
    order = order[~order["layer"].isin([layer for layer in pinned if not pd.isna(layer)])]
    best: tuple[float, Allocation, tuple[int, ...], Sensitivity] | None = None
    for count in range(1, min(len(order), int(len(table.drops) * MOST_DROPPED)) + 1):
        gone = tuple(sorted(int(layer) for layer in order["layer"].iloc[:count]))
        left = _without(table, gone)
        try:
            allocation = left.allocate(budget, {_renumbered(g, gone): c for g, c in pins.items()})
        except OverBudget:
            continue
        total = allocation.loss + float(order["loss"].iloc[:count].sum())
        if best is None or total < best[0]:
            best = total, allocation, gone, left
    if best is None:
        return None
    total, allocation, gone, left = best
    listed = ", ".join(map(str, gone))
    drop = {
        "method": "drop_layers",
        "settings": {"criterion": "listed", "layers": listed, "count": len(gone)},
    }
    mixed = _mixed(left, allocation)
    recipe = Recipe.parse(
        {"steps": [drop, *mixed.model_dump(mode="json")["steps"]], "calibration": table.text}
    )
    words = (
        f"Drop {'layer' if len(gone) == 1 else 'layers'} {listed} ({total - allocation.loss:.3g} {table.unit} alone) and "
        f"store the rest as {_shares(left.cells, allocation.choice_of)}. Losses of dropped layers add up to less than they "
        "cost together."
    )  # fmt: skip
    return _plan("prune and quantize", words, recipe, allocation, total - allocation.loss, table, most)


def _distil(table: Sensitivity, budget: int) -> Plan | None:
    """How many layers of this width a student may have in the budget; None where not even one fits."""
    bits = table.cells.groupby("format")["bits"].median()
    usable = bits.drop(labels=KEEP, errors="ignore")
    format_ = str((usable - STUDENT_BITS).abs().idxmin())
    cells = table.cells[table.cells["format"] == format_]
    layers = cells[cells["layer"].notna()].groupby("layer")
    per_layer, values = float(layers["bytes"].sum().mean()), float(layers["parameters"].sum().mean())
    outside = table.cells[table.cells["layer"].isna() & (table.cells["format"] != KEEP)]
    tables = outside[outside["kind"] != "linear"].groupby("group")["bytes"].min().sum()
    heads = outside[outside["kind"] == "linear"].groupby("group")["bytes"].min().sum()
    room = budget - table.fixed_bytes - int(tables) - int(heads)
    n_layers = int(table.cells["layer"].nunique())
    fitting = min(n_layers, math.floor(room / per_layer))
    if fitting < 1 or fitting == n_layers:
        return None
    parameters = fitting * values + float(outside.drop_duplicates("group")["parameters"].sum())
    words = (
        f"Train a student of {fitting} of the {n_layers} layers, about {parameters / 1e6:.0f} M parameters, stored as "
        f"{format_}. It takes a distillation, which Slimscope cannot run yet; what it will cost is not predicted."
    )
    nbytes = table.fixed_bytes + int(tables) + int(heads) + int(fitting * per_layer)
    return Plan("distil", words, None, nbytes, None, table.unit, None)


def _plan(
    kind: Literal["quantize", "prune and quantize"], words: str, recipe: Recipe, best: Allocation, more: float,
    table: Sensitivity, most: float | None,
) -> Plan:  # fmt: skip
    loss = best.loss + more
    within = None if most is None else loss <= most
    return Plan(kind, words, recipe, best.bytes, loss, table.unit, within, best.choice_of)


def _mixed(table: Sensitivity, best: Allocation) -> Recipe:
    size = f"{best.bytes / 1e6:.2f}MB"
    recipe = Recipe.of("mixed_precision", budget=size, assignment=written(best.choice_of), score="fisher")
    return recipe.calibrated_on(table.text)


def _without(table: Sensitivity, gone: tuple[int, ...]) -> Sensitivity:
    """The table of the model without some layers, the others numbered anew."""
    cells = table.cells[~table.cells["layer"].isin(gone)].copy()
    cells["group"] = [_renumbered(group, gone) for group in cells["group"]]
    cells["layer"] = [
        None if pd.isna(layer) else layer - sum(other < layer for other in gone) for layer in cells["layer"]
    ]
    kept = table.cells[(table.cells["format"] == KEEP) & table.cells["layer"].isin(gone)]
    whole = int(table.drops.loc[table.drops["layer"].isin(gone), "parameters"].sum())
    # What a dropped layer holds outside its groups (norms, biases) goes too, as wide as what is kept.
    rest = (
        (whole - int(kept["parameters"].sum())) * float(kept["bytes"].sum()) / float(kept["parameters"].sum())
    )
    return Sensitivity(
        cells.astype({"layer": "Int64"}), table.drops, table.fixed_bytes - int(rest), table.score, table.unit,
        table.bytes_per_token, table.text,
    )  # fmt: skip


def _renumbered(group: str, gone: tuple[int, ...]) -> str:
    layer, dot, part = group.partition(".")
    if not dot:
        return group
    return f"{int(layer) - sum(other < int(layer) for other in gone)}.{part}"


def _shares(cells: pd.DataFrame, choice_of: Mapping[str, str]) -> str:
    """Formats by their share of parameters."""
    chosen = cells[cells["format"] == cells["group"].map(dict(choice_of))]
    sums = chosen.groupby("format")["parameters"].sum().sort_values(ascending=False)
    return ", ".join(f"{name} {share:.0%}" for name, share in (sums / sums.sum()).items())
