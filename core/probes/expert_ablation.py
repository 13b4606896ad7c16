"""Take every expert out in turn and map what the predictions lose.

Legend: L MoE layers, E experts, S pieces of text, G documents.

Only the blocks from the ablated one on are run again: those before it return what they returned the first time, which
is exact (``core/routing/prefix.py``). An expert that no token of a piece chose is not run at all: its ablation changes
nothing, which is exact too. The number is of these tokens; how often an expert is chosen stands beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._ablation import ablation_share
from core.probes._clustered import ratio_half
from core.probes._provenance import provenance
from core.probes._rerouted import Floats, Ints, Pieces, numbers, predict, runs_cost
from core.probes._routed_text import TextSettings
from core.probes._tokens import limit_cells
from core.registry import Example, method
from core.routing.discover import MoeLayer, moe_layers
from core.routing.lens import Change, Routed, routed
from core.routing.prefix import Returned, blocks_returning, record_blocks
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class ExpertAblationSettings(TextSettings):
    """Which layers' experts to take out, on which text."""

    max_tokens: int = Field(
        1024, ge=64, le=65_536, description="Tokens of the text that are predicted at most, per ablation"
    )
    layers: str = Field(
        "", description="Layers whose experts are taken out, e.g. 0, 3; empty: every MoE layer"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: ExpertAblationSettings) -> Cost:
    """One pass from its layer on per expert, and two whole ones; blocks' outputs are kept for one piece."""
    layers = numbers(settings.layers, what="layer", allowed=[b.index for b in anatomy.blocks if b.is_moe])
    runs = 2 + len(layers) * anatomy.n_experts * ablation_share(anatomy)
    cost = runs_cost(anatomy, n_tokens, settings, runs)
    return Cost(cost.forwards, cost.extra_bytes + 4 * 512 * anatomy.n_layers * anatomy.d_model)


@method(
    "probe",
    title="Expert ablation",
    needs=["decoder", "text", "moe"],
    paper="https://arxiv.org/abs/2402.14800",
    answers="What if it routed otherwise?",
    examples=(
        Example("Every expert, on text of every domain", Prompt("(the text is read instead)")),
        Example("On Python alone", Prompt("(the text is read instead)"), {"text": "domain:python"}),
    ),
    cost=_cost,
)
def expert_ablation(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertAblationSettings
) -> Result:
    """Ablate every expert of every layer in turn and measure what the predictions lose.

    An ablated expert puts out zero; routing stays as it was at its layer, and the weights of the other chosen experts
    too, so nothing takes its place. ΔNLL is the mean surprisal of the text's tokens without the expert minus that with
    it, in nats per token: negative means that this text is predicted better without. Per use, ΔNLL is divided by the
    share of tokens that chose the expert: a rare expert can matter much to the few. Intervals are 95 % (ratio
    estimator over documents, Student's t), each for its expert alone: of 64 experts without effect, some three seem
    to have one.
    """
    started = time.perf_counter()
    every = moe_layers(loaded)
    chosen = numbers(settings.layers, what="layer", allowed=[layer.layer for layer in every])
    layers = [layer for layer in every if layer.layer in chosen]
    n_experts = max(layer.n_experts for layer in layers)
    limit_cells(len(layers), n_experts)
    with loaded.lock, torch.inference_mode(), fast_fp32(n_experts=loaded.anatomy.n_experts) as path:
        pieces = Pieces.of(loaded, prompt, settings)
        scans = []
        for number, ids_T in enumerate(pieces.ids):
            progress(number, len(pieces.ids), f"ablating {len(layers)} × {n_experts} experts")
            scans.append(_scan(loaded, layers, n_experts, ids_T))
        gap, checked = _gap(loaded, layers, pieces.ids[0], scans[0])
    frame = _frame(layers, pieces, scans)
    ranked = frame.sort_values("delta_nats", ascending=False, kind="stable", ignore_index=True)
    return Result(
        frames={"ranked": _ends(ranked), "main": frame},
        views=_VIEWS,
        metrics=_metrics(ranked, scans, pieces),
        provenance=provenance(
            loaded,
            prompt,
            method="expert_ablation",
            settings=settings,
            started=started,
            conditions={**pieces.conditions, "fp32_path": path.name},
            exactness_gap=gap,
            exactness_check=f"|surprisal − that of a whole forward pass| of the first piece, {checked} ablated",
        ),
        notes=(pieces.note, "An expert that no token chose has an effect of exactly 0."),
    )


_VIEWS = (
    View(
        "table",
        x="name",
        y="delta_nats",
        frame="ranked",
        title="Experts by the loss their ablation adds (and the last ten)",
        tooltip=("low", "high", "load", "delta_nats_per_use"),
    ),
    View(
        "heatmap",
        x="expert",
        y="layer",
        color="delta_nats",
        title="Loss that ablating an expert adds",
        unit="nats/token",
        midpoint=0.0,
        tooltip=("name", "low", "high", "load", "delta_nats_per_use"),
    ),
    View(
        "scatter",
        x="load",
        y="delta_nats",
        color="layer",
        title="Loss added against load",
        unit="nats/token",
        tooltip=("name", "low", "high", "delta_nats_per_use"),
    ),
)


@dataclass(frozen=True)
class _Scan:
    """What the ablations did on one piece."""

    nats: float
    """Surprisal of the piece, nothing ablated."""
    added_LE: Floats
    """Surprisal that each ablation adds."""
    uses_LE: Ints
    """Tokens that chose each expert, the last one included, which predicts nothing here."""


def _scan(loaded: LoadedModel, layers: list[MoeLayer], n_experts: int, ids_T: Tensor) -> _Scan:
    """Ablate every expert that this piece uses."""
    uses: dict[int, Ints] = {}

    def count(seen: Routed) -> None:
        used = seen.experts_TK[seen.experts_TK >= 0]
        uses[seen.layer] = torch.bincount(used, minlength=n_experts).cpu().numpy()

    with record_blocks(loaded) as returned, routed(loaded, count):
        base = predict(loaded, ids_T).nats_N.sum()
    uses_LE = np.stack([uses[layer.layer] for layer in layers])
    added_LE = np.zeros(uses_LE.shape)
    for row, layer in enumerate(layers):
        for expert in np.flatnonzero(uses_LE[row]).tolist():
            added_LE[row, expert] = _without(loaded, layer.layer, expert, ids_T, returned) - base
    return _Scan(float(base), added_LE, uses_LE)


def _without(loaded: LoadedModel, layer: int, expert: int, ids_T: Tensor, returned: Returned | None) -> float:
    """Surprisal of a piece without one expert: from its block on, or of a whole pass where nothing is handed in."""
    before = 0 if returned is None else layer
    with (
        blocks_returning(loaded, returned or {}, before=before),
        routed(loaded, change=Change(ablate={layer: frozenset({expert})}), first_layer=before),
    ):
        return float(predict(loaded, ids_T).nats_N.sum())


def _gap(loaded: LoadedModel, layers: list[MoeLayer], ids_T: Tensor, scan: _Scan) -> tuple[float, str]:
    """How far the largest effect in the last layer is from that of a whole forward pass; the expert's name."""
    row, expert = len(layers) - 1, int(np.abs(scan.added_LE[-1]).argmax())
    whole = _without(loaded, layers[row].layer, expert, ids_T, None) - scan.nats
    return abs(whole - float(scan.added_LE[row, expert])), f"L{layers[row].layer}E{expert}"


def _frame(layers: list[MoeLayer], pieces: Pieces, scans: list[_Scan]) -> pd.DataFrame:
    """One row per layer and expert."""
    added_GLE = pieces.per_document([scan.added_LE for scan in scans])
    uses_LE = np.sum([scan.uses_LE for scan in scans], axis=0)
    predicted_G11 = pieces.predicted_G[:, None, None]
    delta_LE = added_GLE.sum(0) / pieces.n_predicted
    half_LE = ratio_half(added_GLE, predicted_G11)
    n_tokens = sum(len(ids) for ids in pieces.ids)
    row_N, expert_N = np.indices(uses_LE.shape).reshape(2, -1)
    counts = np.array([layer.n_experts for layer in layers])
    frame = pd.DataFrame(
        {
            "name": [f"L{layers[row].layer}E{e}" for row, e in zip(row_N, expert_N, strict=True)],
            "layer": np.array([layer.layer for layer in layers])[row_N],
            "expert": expert_N,
            "delta_nats": delta_LE.ravel(),
            "low": (delta_LE - half_LE).ravel(),
            "high": (delta_LE + half_LE).ravel(),
            "load": (uses_LE / n_tokens).ravel(),
            "delta_nats_per_use": np.divide(
                added_GLE.sum(0), uses_LE, out=np.zeros(uses_LE.shape), where=uses_LE > 0
            ).ravel(),
        }
    )
    there: pd.DataFrame = frame.loc[expert_N < counts[row_N]]
    return there.reset_index(drop=True)


def _ends(ranked: pd.DataFrame) -> pd.DataFrame:
    """The first forty experts and the last ten."""
    ends: pd.DataFrame = ranked.loc[(ranked.index < 40) | (ranked.index >= len(ranked) - 10)]
    return ends.reset_index(drop=True)


def _metrics(ranked: pd.DataFrame, scans: list[_Scan], pieces: Pieces) -> tuple[Metric, ...]:
    n = pieces.n_predicted
    loss = pieces.bootstrap().ratio(pieces.per_document([scan.nats for scan in scans]), pieces.predicted_G)
    top = ranked.iloc[0]
    value = sum(scan.nats for scan in scans) / n
    interval = (
        "" if np.isnan(top["low"]) else f"ratio estimator over {pieces.n_documents} documents, Student's t"
    )
    low, high = (None, None) if not interval else (float(top["low"]), float(top["high"]))
    return (
        Metric("loss", value, "nats/token", "lower", n, loss.low, loss.high, loss.how),
        Metric(
            "largest_loss_added", float(top["delta_nats"]), "nats/token", "neither", n, low, high, interval
        ),
        Metric("experts_better_gone", float((ranked["high"] < 0).sum()), "experts", "neither", len(ranked)),
    )
