"""Attribution patching: a first-order estimate of activation patching for every cell at once (Nanda 2023; Syed 2023).

One backward pass instead of one run per cell. It is an estimate, so the cells that matter most, and a sample of the
others, are patched exactly and laid beside it. It does not correct for saturated attention (AtP*'s QK fix).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.models.gradients import differentiable, require_gradients
from core.probes._node_gradients import node_gradients
from core.probes._patch_grid import PER_HEAD, Grid, PatchSettings, node_of, open_grid
from core.probes._patch_report import FACTUAL_RECALL, INDIRECT_OBJECT, grid_notes
from core.probes._provenance import provenance
from core.registry import Example, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

LOW_CORRELATION = 0.7
"""Below this the estimate is flagged: its ranking is not to be trusted."""


class AttributionPatchingSettings(PatchSettings):
    """What is patched, between which prompts, what is measured, and how much of it is verified."""

    verify: int = Field(16, ge=4, le=200, description="Cells of the largest estimates to patch exactly")
    sample: int = Field(16, ge=4, le=200, description="Other cells, drawn by seed 0, to patch exactly")


def _cost(anatomy: Anatomy, n_tokens: int, settings: AttributionPatchingSettings) -> Cost:
    exact = 0.3 * (settings.verify + settings.sample)
    states = 12 * anatomy.n_layers * n_tokens * (6 * anatomy.d_model + 3 * anatomy.d_ff)
    return Cost(8 + exact, states)


@method(
    "probe",
    title="Attribution patching",
    needs=["decoder", "text", "heads"],
    paper="https://arxiv.org/abs/2310.10348",
    answers="Which heads matter?",
    cost=_cost,
    examples=(
        Example(
            "Indirect object: every head at once",
            INDIRECT_OBJECT.prompt,
            {**INDIRECT_OBJECT.settings, "node": "head"},
        ),
        Example(
            "Factual recall: which MLP writes the capital?",
            FACTUAL_RECALL.prompt,
            {**FACTUAL_RECALL.settings, "node": "mlp_out"},
        ),
    ),
)
def attribution_patching(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: AttributionPatchingSettings
) -> Result:
    """Estimate what patching every cell would do, from one gradient, and check the estimate where it counts.

    The estimate is (source − base) · ∂m/∂node at the base run, as a share of the gap between both prompts: exact where the
    metric is linear in the node, wrong where attention or the metric saturates. The largest estimates are patched
    exactly, and a random sample of the others too, for an estimate of 0 may hide a large effect. Pearson and Spearman
    correlations are over those verified cells.
    """
    started = time.perf_counter()
    if settings.metric == "kl" and settings.direction == "noising":
        raise BadInput(
            "KL to the clean prediction has gradient 0 at the clean run, so noising cannot be estimated by it; "
            "choose denoising, or the metric logit_difference"
        )
    with loaded.lock:
        require_gradients(loaded)
        with torch.inference_mode():
            grid = open_grid(loaded, prompt, settings)
        progress(1, 3, "gradient of every cell")
        estimates, gradient_gap = _estimate(grid)
        chosen = _chosen(np.abs(estimates), settings)
        progress(2, 3, f"patching {len(chosen)} cells exactly")
        with torch.inference_mode():
            cells = [grid.cells[index] for index in chosen]
            values = grid.exact(cells)
            hooked = grid.hooked_gap(cells[0], float(values[0]))
    main = grid.frame(grid.cells, estimates)
    verified = grid.frame(cells, grid.effect(values), values).rename(columns={"effect": "exact_effect"})
    verified.insert(0, "rank", np.arange(1, len(chosen) + 1))
    verified["effect"] = estimates[chosen]
    verified["drawn"] = np.where(np.arange(len(chosen)) < settings.verify, "largest estimates", "sample")
    pearson, spearman = _correlations(verified)
    low = min(pearson, spearman) < LOW_CORRELATION
    return Result(
        frames={"verified": verified, "main": main},
        views=_views(grid),
        metrics=(
            Metric("pearson", pearson, "", "higher", n=len(chosen)),
            Metric("spearman", spearman, "", "higher", n=len(chosen)),
            Metric("cells", float(len(estimates)), "cells"),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="attribution_patching",
            settings=settings,
            started=started,
            conditions={
                "tokens": grid.pair.n_tokens,
                "measured": grid.metric.label,
                "hooked_forward_gap": hooked,
            },
            exactness_gap=max(gradient_gap, hooked),
            exactness_check=f"largest of |{grid.metric.unit} of the differentiated run − of the plain run| and "
            "|top verified cell − one whole forward with a hook there|; the estimate itself is first-order",
        ),
        notes=(
            *grid_notes(grid),
            _verified_note(len(chosen), settings, pearson, spearman),
        ),
        flags=("low correlation with exact patching",) if low else (),
    )


def _estimate(grid: Grid) -> tuple[np.ndarray, float]:
    """Effect of every cell to first order, and |metric of this run − metric of the recorded base run|."""
    node = node_of(grid.settings.node)
    with differentiable():  # a clone made here belongs to autograd, the recorded tensor does not
        metric = replace(grid.metric, reference_log_p_V=grid.metric.reference_log_p_V.clone())
    gradients, value = node_gradients(grid.loaded, grid.base_inputs, node, metric.of_logits)
    with torch.inference_mode():
        pairs = zip(grid.source.states[node], grid.base.states[node], gradients, strict=False)
        moved = [_products(source, base, gradient) for source, base, gradient in pairs]
        totals_LPH = torch.stack(moved).double().cpu().numpy()
    steps = np.array([totals_LPH[c.layer, c.start : c.stop, c.head].sum() for c in grid.cells])
    return grid.effect(grid.base_value + steps), abs(value - grid.base_value)


def _products(source: Tensor, base: Tensor, gradient: Tensor) -> Tensor:
    """(source − base) · gradient per position and head, [P, heads or 1], summed in float32 or better."""
    product = (source.to(gradient) - base.to(gradient)).double() * gradient.double()
    return product.sum(-1).view(len(source), -1)


def _chosen(sizes: np.ndarray, settings: AttributionPatchingSettings) -> list[int]:
    """The largest estimates, then a sample of the others."""
    order = np.argsort(-sizes, kind="stable")
    top, rest = order[: settings.verify], order[settings.verify :]
    drawn = np.random.default_rng(0).permutation(rest)[: settings.sample]
    return [int(index) for index in (*top, *drawn)]


def _correlations(verified: pd.DataFrame) -> tuple[float, float]:
    """Pearson and Spearman between estimate and exact effect; 0 where one of them is constant."""
    return _pearson(verified["effect"], verified["exact_effect"]), _pearson(
        verified["effect"].rank(), verified["exact_effect"].rank()
    )


def _pearson(a: pd.Series, b: pd.Series) -> float:
    if a.nunique() < 2 or b.nunique() < 2:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _verified_note(n: int, settings: AttributionPatchingSettings, pearson: float, spearman: float) -> str:
    top = min(settings.verify, n)
    return (
        f"Patched exactly: the {top} largest estimates and {n - top} of the other cells, drawn at random; "
        f"Pearson {pearson:.3f}, Spearman {spearman:.3f} over these."
    )


def _views(grid: Grid) -> tuple[View, ...]:
    per_head = grid.settings.node in PER_HEAD
    place = ("layer", "head") if per_head else ("layer", "position", "token", "corrupted_token")
    return (
        View(
            "table",
            x="rank",
            y="exact_effect",
            frame="verified",
            title=f"Largest estimated effects on {grid.metric.label}, patched exactly",
            unit="share of the gap",
            tooltip=(*place, "effect", "metric", "drawn"),
        ),
        View(
            "heatmap",
            x="head" if per_head else "position",
            y="layer",
            color="effect",
            title=f"Estimated share of {grid.metric.label} that each cell moves",
            unit="share of the gap",
            midpoint=0.0,
            tooltip=place[2:],
        ),
        View(
            "scatter",
            x="effect",
            y="exact_effect",
            color="drawn",
            frame="verified",
            title="Estimate against exact patching",
            unit="share of the gap",
            tooltip=place,
        ),
    )
