"""What the budget panel shows, as plain functions: the stored sensitivities, plans, the grid with its cut, two charts.

Nothing here runs a model: a budget is spent by integer programming on a stored table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
from numpy.typing import NDArray

from app import engine
from app import format as fmt
from app.charts import PADDING, SELECTED
from core.budget.allocation import Allocation, OverBudget
from core.budget.assignment import LOSS_OF, least_losses, menu_of, written
from core.budget.formats import KEEP
from core.budget.plans import Plan, Sensitivity, plans
from core.catalog.queries import VariantDetail
from core.planning import newest_sensitivity
from core.types import Run

NEUTRAL = "#8A93A6"
CURVE_POINTS = 161
USUAL_BITS, MOST_BITS = 4.5, 10.0
"""Bits per weight of the budget that a slider begins with, and of the largest it offers."""
STAGES = "stages"
"""The frame of ``mixed_precision`` with predicted and measured loss."""
CUT, PINNED = "●", "◆"
"""What marks the chosen and the pinned cells of the grid."""


@st.cache_data(max_entries=16, show_spinner=False)
def newest(variant_id: str, revision: int) -> Run | None:
    """The latest stored sensitivities of a base or variant, as of a revision of the catalog."""
    return newest_sensitivity(engine.catalog(), variant_id)


@st.cache_data(max_entries=256, show_spinner=False)
def planned(
    run_id: str, budget: int, tolerance: str | None, pins: tuple[tuple[str, str], ...]
) -> tuple[Plan, ...]:
    """Up to three plans. Raises ``BadInput`` as ``core.budget.plans.plans`` does."""
    return plans(sensitivity(run_id), budget, tolerance=tolerance, pins=dict(pins))


def sensitivity(run_id: str) -> Sensitivity:
    """The table of a stored run."""
    return Sensitivity.of(engine.result_of(run_id))


@dataclass(frozen=True)
class Range:
    """The bytes between which a budget makes sense."""

    smallest: int
    whole: int
    """With nothing changed."""


@st.cache_data(max_entries=16, show_spinner=False)
def budget_range(run_id: str, pins: tuple[tuple[str, str], ...]) -> Range:
    """Between the smallest file and the model as it is. Raises ``BadInput`` for pins that cannot be."""
    table = sensitivity(run_id)
    kept = table.cells.loc[table.cells["format"] == KEEP, "bytes"]
    try:
        table.allocate(0, dict(pins))
    except OverBudget as error:
        return Range(error.minimum, int(kept.sum()) + table.fixed_bytes)
    raise AssertionError("no model has 0 bytes")


def useful_bytes(limits: Range, table: Sensitivity) -> int:
    """Where a budget ends to be one: beyond 8 bits and their scales every part is kept nearly as it is."""
    return max(limits.smallest + 1, min(limits.whole, int(MOST_BITS * table.parameters / 8)))


@dataclass(frozen=True, eq=False)
class CutGrid:
    """Groups by formats: losses as colours, the chosen and pinned cells as marks."""

    values_RC: NDArray[np.floating]
    words: list[list[str]]
    hover: list[list[str]]
    rows: list[str]
    cols: list[str]


def cut_grid(table: Sensitivity, chosen: Mapping[str, str], pins: Mapping[str, str]) -> CutGrid:
    """One row per group and one column per format, in the table's order; what cannot be is empty."""
    menu = menu_of(table.cells, fixed_bytes=table.fixed_bytes, score=table.score)
    loss_GC = menu.loss_GC.copy()
    positive = loss_GC[loss_GC > 0]
    loss_GC[loss_GC == 0] = positive.min() / 2 if positive.size else 1.0  # a logarithm has no 0
    marks = [
        [PINNED if pins.get(g) == c else CUT if chosen.get(g) == c else "" for c in menu.choices]
        for g in menu.groups
    ]
    hover = [
        [
            "not possible"
            if np.isnan(loss)
            else f"{g} as {c}: {loss:.3g} {table.unit}, {fmt.size(int(nbytes))}"
            for c, loss, nbytes in zip(menu.choices, menu.loss_GC[row], menu.bytes_GC[row], strict=True)
        ]
        for row, g in enumerate(menu.groups)
    ]
    return CutGrid(loss_GC, marks, hover, list(menu.groups), list(menu.choices))


def toggled(pins: Mapping[str, str], group: str, choice: str) -> str:
    """The pins as text after a click on a cell: set, moved, or taken away."""
    kept = {name: made for name, made in pins.items() if name != group}
    return written(kept if pins.get(group) == choice else {**kept, group: choice})


def curve(table: Sensitivity, pins: Mapping[str, str], here: Allocation, ends: Range) -> Any:
    """Loss over size: what no readable file goes below, and where the budget is."""
    sizes_N = np.linspace(ends.smallest, useful_bytes(ends, table), CURVE_POINTS).astype(int)
    least_N = least_losses(
        table.cells, sizes_N.tolist(), fixed_bytes=table.fixed_bytes, score=table.score, pins=pins
    )
    line = pd.DataFrame({"mb": sizes_N / 1e6, "loss": least_N}).query("loss > 0")  # a logarithm has no 0
    point = pd.DataFrame({"mb": [here.bytes / 1e6], "loss": [here.loss]}).query("loss > 0")
    x = alt.X("mb:Q", title="Size, MB", scale=alt.Scale(zero=False))
    y = alt.Y(
        "loss:Q",
        title=f"Expected loss, {table.unit}",
        scale=alt.Scale(type="log"),
        axis=alt.Axis(tickCount=5, format="~g"),
    )
    tooltip = [
        alt.Tooltip("mb:Q", title="Size, MB", format=".2f"),
        alt.Tooltip("loss:Q", title=f"Expected loss, {table.unit}", format=".3~g"),
    ]
    return alt.layer(
        alt.Chart(line).mark_line(color=NEUTRAL, strokeWidth=1.6).encode(x=x, y=y),
        alt.Chart(point)
        .mark_point(size=140, filled=True, color=SELECTED, opacity=1)
        .encode(x=x, y=y, tooltip=tooltip),
    ).properties(height=220, padding=PADDING)


def stages_of(detail: VariantDetail) -> pd.DataFrame | None:
    """Predicted and measured loss while a variant's parts were stored, of its latest run that kept them; else None."""
    run = next((run for run, name in detail.frames if name == STAGES), None)
    return None if run is None else _frame(run, STAGES)


@st.cache_data(max_entries=16, show_spinner=False)
def _frame(run_id: str, name: str) -> pd.DataFrame:
    return engine.catalog().frame(run_id, name)


def predicted_chart(points: pd.DataFrame, unit: str) -> Any:
    """Predicted against measured loss as the parts were stored one after the other; the line is where both are equal."""
    top = float(np.nanmax(points[["predicted", "loss"]].to_numpy()))
    equal = pd.DataFrame({"predicted": [0.0, top], "loss": [0.0, top]})
    x = alt.X("predicted:Q", title=f"Predicted loss, {unit}")
    y = alt.Y("loss:Q", title=f"Measured loss, {unit}")
    layers = [alt.Chart(equal).mark_line(color=NEUTRAL, strokeDash=[4, 4]).encode(x=x, y=y)]
    if points["loss_low"].notna().all():
        layers.append(
            alt.Chart(points).mark_rule(color=NEUTRAL).encode(x=x, y="loss_low:Q", y2="loss_high:Q")
        )
    layers.append(
        alt.Chart(points)
        .mark_point(size=60, filled=True, color=SELECTED)
        .encode(x=x, y=y, tooltip=["parts", "predicted", "loss", "loss_low", "loss_high"])
    )
    return alt.layer(*layers).properties(height=200, padding=PADDING)


def meaning(table: Sensitivity) -> str:
    """What a loss is, with its unit."""
    return "nats of KL to the model per token" if table.unit == "nats" else table.unit


def how(table: Sensitivity) -> str:
    """Where the losses of single parts come from."""
    return "measured" if LOSS_OF[table.score] == "loss" else "estimated (Fisher)"
