"""Choosing the experts that stay: what a text shows of them, the choice by a criterion, and how good it is.

A choice is held against random ones of the same size, and where there are few enough sets against the best, by how far
each layer's output moves on calibration tokens. Nothing is changed here.

Legend: ``L`` MoE layers, ``E`` experts, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from core.errors import BadInput
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.routing.aggregate import Aggregates, aggregate
from core.routing.criteria import CRITERIA, Criterion, Floats, best_experts, never_reached, scores_LE
from core.routing.discover import MoeLayer
from core.routing.exhaustive import MAX_SETS, LayerLoss, best_subset, layer_inputs, n_sets
from core.routing.passages import passages
from core.routing.super_experts import output_peaks, super_experts
from core.types import Documents, Progress, part_of

PASSAGE = 256
"""Tokens run together at most where single outputs are looked at."""
PEAK_TOKENS = 4096
"""Tokens on which super-experts are looked for."""
SEARCH_TOKENS = 2048
"""Tokens on which the exhaustive search measures its losses."""
RANDOM_SETS = 16
"""Random kept sets per layer that a choice is held against."""

Protected = Mapping[int, Collection[int]]
"""Layer → experts that must stay."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the calibration text showed; no counts for a criterion that reads none."""

    counts: Aggregates | None
    inputs: Mapping[int, Any]
    """Layer → hidden states [T, D] that its experts read, for comparing choices; empty where not asked for."""
    super_experts: Mapping[int, tuple[int, ...]]

    def never(self, layers: Sequence[MoeLayer]) -> dict[int, tuple[int, ...]]:
        """Experts that no token was routed to."""
        return {} if self.counts is None else never_reached(layers, self.counts)


@dataclass(frozen=True, eq=False)
class Choice:
    """What stays, and two tables on why."""

    kept: dict[int, list[int]]
    experts: pd.DataFrame
    """layer, expert, score, relative_score (to the layer's mean), rank, tokens, load_share, status."""
    layers: pd.DataFrame
    """layer, removed, load_removed, probability_removed, sets (how many there are), and the relative change of the layer's
    output: change, change_random, change_best (missing where there are too many sets). What was not read is missing."""


def gather(
    loaded: LoadedModel,
    layers: Sequence[MoeLayer],
    calibration: Documents,
    criterion: Criterion,
    progress: Progress,
    *,
    max_tokens: int,
    compare_tokens: int,
    peaks: bool,
) -> Evidence:
    """Run as much of the text as the criterion, the comparison and the search for super-experts need.

    Raises ``BadInput`` where a family's experts give no single output and one is needed.
    """
    shim = any(at.shim for at in layers)
    if shim and criterion in ("reap", "man", "msan", "ean", "naee"):
        raise BadInput(
            f"{layers[0].experts}: single experts' outputs cannot be read in this family; choose frequency or aimer"
        )
    counts = None
    if CRITERIA[criterion].reads_text:
        counts = aggregate(
            loaded, calibration, part_of(progress, 0.0, 0.8), max_tokens=max_tokens, norms=not shim
        )
    compare = SEARCH_TOKENS if criterion == "naee" else compare_tokens
    inputs: Mapping[int, Any] = {}
    supers: Mapping[int, tuple[int, ...]] = {}
    with loaded.lock, torch.inference_mode():
        if not shim and (compare or peaks):
            budget = min(max_tokens, max(compare, PEAK_TOKENS if peaks else 0))
            texts = passages(loaded, calibration, length=PASSAGE, max_tokens=budget)
            inputs = layer_inputs(loaded, texts, compare)
            if peaks:
                progress(0.9, 1.0, "looking for super-experts")
                supers = super_experts(output_peaks(loaded, layers, texts), layers, loaded.anatomy.n_layers)
    return Evidence(counts, inputs, supers)


def choose(
    loaded: LoadedModel,
    layers: Sequence[MoeLayer],
    criterion: Criterion,
    n_kept: int,
    evidence: Evidence,
    progress: Progress,
    *,
    protected: Protected,
    seed: int,
) -> Choice:
    """Decide which ``n_kept`` experts of each layer stay. Raises ``BadInput`` where too many are protected."""
    searched = criterion == "naee"
    scores = None if searched else scores_LE(criterion, loaded, layers, evidence.counts, seed=seed)
    kept: dict[int, list[int]] = {}
    rows = []
    for index, at in enumerate(layers):
        progress(index, len(layers), f"choosing the experts of layer {at.layer}")
        guarded = frozenset(protected.get(at.layer, ()))
        loss = None
        if at.layer in evidence.inputs:
            loss = LayerLoss(loaded, at, evidence.inputs[at.layer])
        if scores is None:
            assert loss is not None, "the exhaustive search was given no hidden states"
            kept[at.layer] = list(best_subset(loss, at, n_kept, guarded).kept)
        else:
            kept[at.layer] = best_experts(at, scores[index], n_kept, guarded)
        rows.append(_layer_row(at, index, kept[at.layer], evidence.counts, loss, seed))
    experts = _expert_frame(layers, kept, scores, evidence, protected)
    return Choice(kept, experts, pd.DataFrame(rows))


def _layer_row(
    at: MoeLayer, index: int, kept: list[int], counts: Aggregates | None, loss: LayerLoss | None, seed: int
) -> dict[str, Any]:
    gone = [e for e in range(at.n_experts) if e not in kept]
    row: dict[str, Any] = {"layer": at.layer, "removed": ", ".join(map(str, gone))}
    row |= dict.fromkeys(
        ("load_removed", "probability_removed", "change", "change_random", "change_best"), np.nan
    )
    row["sets"] = n_sets(at, len(kept))
    if counts is not None:
        row["load_removed"] = counts.load_LE[index, gone].sum() / max(1, counts.load_LE[index].sum())
        row["probability_removed"] = counts.probability_LE[index, gone].sum() / counts.n_tokens
    if loss is not None:
        draw = np.random.default_rng([seed, at.layer])
        random = [loss.of(best_experts(at, draw.random(at.n_experts), len(kept))) for _ in range(RANDOM_SETS)]
        best = best_subset(loss, at, len(kept)).loss if row["sets"] <= MAX_SETS else np.nan
        row |= {
            "change": loss.of(kept) / loss.norm,
            "change_random": float(np.mean(random)) / loss.norm,
            "change_best": best / loss.norm,
        }
    return row


def _expert_frame(
    layers: Sequence[MoeLayer],
    kept: Mapping[int, list[int]],
    scores: Floats | None,
    evidence: Evidence,
    protected: Protected,
) -> pd.DataFrame:
    counts, never = evidence.counts, evidence.never(layers)
    rows = []
    for index, at in enumerate(layers):
        mean = np.nan if scores is None else np.abs(scores[index]).mean()
        order = None if scores is None else np.argsort(-scores[index], kind="stable").argsort() + 1
        for e in range(at.n_experts):
            status = "kept" if e in kept[at.layer] else "removed"
            if e in protected.get(at.layer, ()):
                status += ", protected"
            if e in never.get(at.layer, ()):
                status += ", never reached"
            rows.append(
                {
                    "layer": at.layer,
                    "expert": e,
                    "kept": int(e in kept[at.layer]),
                    "score": np.nan if scores is None else scores[index, e],
                    "relative_score": np.nan if scores is None else scores[index, e] / mean if mean else 0.0,
                    "rank": None if order is None else int(order[e]),
                    "tokens": None if counts is None else int(counts.load_LE[index, e]),
                    "load_share": np.nan
                    if counts is None
                    else counts.load_LE[index, e] / counts.load_LE[index].sum(),
                    "status": status,
                }
            )
    return pd.DataFrame(rows).astype({"rank": "Int64", "tokens": "Int64"})
