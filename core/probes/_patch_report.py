"""How patching is shown: worked examples, the ranked table, the map, and what a reader must know. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd

from core.probes._patch_grid import PER_HEAD, Grid
from core.probes._patch_metric import PatchMetric
from core.registry import Example
from core.types import Metric, Prompt, View

INDIRECT_OBJECT = Example(
    "Indirect object: who gets the drink?",
    Prompt("When Mary and John went to the store, John gave a drink to"),
    {
        "corrupted": "When Mary and John went to the store, Mary gave a drink to",
        "target": " Mary",
        "distractor": " John",
    },
)
FACTUAL_RECALL = Example(
    "Factual recall: the capital of France",
    Prompt("The capital of the country France is the city of"),
    {
        "corrupted": "The capital of the country Italy is the city of",
        "target": " Paris",
        "distractor": " Rome",
    },
)
RANKED = 50
"""Rows of the ranked table."""


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells with the largest effect of either sign, the strongest first."""
    order = frame["effect"].abs().sort_values(ascending=False, kind="stable").index[:RANKED]
    top = frame.loc[order].reset_index(drop=True)
    top.insert(0, "rank", np.arange(1, len(top) + 1))
    return top


def headline(metric: PatchMetric, effects: np.ndarray) -> tuple[Metric, ...]:
    """Both ends of the gap, and the effect that is largest in size."""
    return (
        Metric("clean", metric.clean, metric.unit),
        Metric("corrupted", metric.corrupted, metric.unit),
        Metric(
            "strongest_effect", float(effects[np.abs(effects).argmax()]), "share of the gap", n=len(effects)
        ),
    )


def grid_views(grid: Grid) -> tuple[View, ...]:
    """The ranked table, then the map: layer × head, or layer × position."""
    per_head = grid.settings.node in PER_HEAD
    place = ("layer", "head") if per_head else ("layer", "position", "token", "corrupted_token")
    did = "brings back" if grid.settings.direction == "denoising" else "destroys"
    return (
        View(
            "table",
            x="rank",
            y="effect",
            frame="ranked",
            title=f"Which {grid.settings.node} {did} most of {grid.metric.label}",
            unit="share of the gap",
            tooltip=(*place, "metric", "recovered"),
        ),
        View(
            "heatmap",
            x="head" if per_head else "position",
            y="layer",
            color="effect",
            title=f"Share of {grid.metric.label} that each cell {did}",
            unit="share of the gap",
            midpoint=0.0,
            tooltip=(*place[2:], "metric", "recovered"),
        ),
    )


def grid_notes(grid: Grid) -> tuple[str, ...]:
    """What a reader must know about this grid."""
    metric, pair = grid.metric, grid.pair
    tokens = ", ".join(
        f"{pair.clean.texts[p]!r} → {pair.corrupted.texts[p]!r} (position {p})" for p in pair.differing[:8]
    )
    notes = [
        f"{metric.label}: {metric.clean:.4g} on the clean, {metric.corrupted:.4g} on the corrupted prompt.",
        f"Tokens that differ: {tokens}{' …' if len(pair.differing) > 8 else ''}; before the first no cell can have an effect.",
    ]
    anatomy = grid.loaded.anatomy
    if grid.settings.node in ("k", "v") and anatomy.n_kv_heads < anatomy.n_heads:
        notes.append(
            f"Keys and values are shared: each of the {anatomy.n_kv_heads} serves {anatomy.n_heads // anatomy.n_kv_heads} query heads."
        )
    if metric.name != "kl" and (metric.gap < 0):
        notes.append(
            "The clean prompt favours the target less than the corrupted one does: target and distractor may be swapped."
        )
    return tuple(notes)
