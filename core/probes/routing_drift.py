"""Where a variant routes tokens otherwise than its original, and how much of the loss that explains.

Legend: L MoE layers, T tokens, E experts, S pieces, N predicted tokens.

It reads two models of one shape on the same tokens. What the weights broke inside is ``compression_drift.py``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._drift_frames import (
    MAX_EDGES,
    Whole,
    cells,
    layer_rows,
    margins,
    moved,
    split,
    token_rows,
    verdicts,
)
from core.probes._provenance import provenance
from core.probes._rerouted import Pieces, runs_cost
from core.probes._routed_text import TextSettings, place_of
from core.probes._routing_drift import compare, names_of
from core.probes._twins import conditions, refuse_another_shape, refuse_other_tokens
from core.registry import Example, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class RoutingDriftSettings(TextSettings):
    """Which text, which layer's moves, and when a flip counts as harm."""

    text: str = Field(
        "",
        description="Text instead of the prompt: domains, domain:NAME, pydoc, a .txt or .jsonl file, or hub:ID",
    )
    max_tokens: int = Field(1024, ge=64, le=4096, description="Tokens of the text that are read at most")
    layer: int = Field(
        -1, ge=-1, le=1023, description="Layer whose moves are mapped; -1: the one that drifted most"
    )
    harm_nats: float = Field(
        0.05, gt=0, le=10, description="Surprisal added by routing, in nats, from which on a flip is harmful"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: RoutingDriftSettings) -> Cost:
    """Two passes of the original; of the variant two of its own and two replays; every decision is kept."""
    return runs_cost(anatomy, n_tokens, settings, 6)


@method(
    "probe",
    title="Routing drift",
    needs=["decoder", "text", "moe"],
    paper="https://arxiv.org/abs/2506.13329",
    answers="What did compression break?",
    examples=(
        Example(
            "A piece of Python",
            Prompt("def mean(values):\n    total = sum(values)\n    return total / len(values)\n"),
        ),
        Example("Text of every domain", Prompt("(the text is read instead)"), {"text": "domains"}),
    ),
    cost=_cost,
)
def routing_drift(
    loaded: LoadedModel,
    reference: LoadedModel,
    prompt: Prompt,
    progress: Progress,
    settings: RoutingDriftSettings,
) -> Result:
    """Compare the experts that a variant and its original give the same tokens, and split the loss.

    Overlap is |S ∩ S'| / k per token and layer; two uniform choices share k/E. The loss that the variant adds is split
    by a replay: the variant's weights, made to use the original's experts and routing weights in every layer. What
    that adds to the original is weight error; what the variant's own routing adds to it is routing error; the two sum
    to the whole. A flip is a token and layer where an expert changed; a token with flips is harmed where routing error
    exceeds ``harm_nats``, helped where it is below minus that, and else the flips were harmless. Flips of earlier
    tokens reach it through attention, so this blames a text's routing, not one slot. The margin is the original's
    lowest chosen minus its highest left-out logit: small margins flip.
    """
    started = time.perf_counter()
    refuse_another_shape(loaded, reference)
    ours, theirs, names = names_of(loaded, reference)
    with (
        loaded.lock,
        reference.lock,
        torch.inference_mode(),
        fast_fp32(n_experts=loaded.anatomy.n_experts) as path,
    ):
        pieces = Pieces.of(loaded, prompt, settings)
        other = Pieces.of(reference, prompt, settings)
        for a, b in zip(pieces.ids, other.ids, strict=True):
            refuse_other_tokens(loaded, reference, a.tolist(), b.tolist())
        drifts, gaps = [], []
        for number, ids_T in enumerate(pieces.ids):
            progress(number, len(pieces.ids), "routing by both models")
            drift, gap = compare(loaded, reference, ids_T, names)
            drifts.append(drift)
            gaps.append(gap)
    whole = Whole.of(pieces, drifts)
    layers = layer_rows(whole)
    shown = place_of(settings.layer, whole.layers) if settings.layer >= 0 else int(layers["overlap"].argmin())
    tokens = token_rows(loaded, drifts, settings.harm_nats)
    return Result(
        frames={
            "tokens": tokens[tokens["piece"] == 0].reset_index(drop=True),
            "ranked": tokens.sort_values("routing_nats", key=abs, ascending=False, ignore_index=True).head(
                100
            ),
            "split": split(whole),
            "layers": layers,
            "main": cells(drifts[0]),
            "margins": margins(whole),
            "moved": moved(drifts, shown),
            "verdicts": verdicts(tokens),
        },
        views=_views(whole.layers[shown]),
        metrics=_metrics(whole, tokens),
        provenance=provenance(
            loaded,
            prompt,
            method="routing_drift",
            settings=settings,
            started=started,
            conditions=conditions(pieces.conditions, reference, path),
            exactness_gap=max(gaps),
            exactness_check="largest |surprisal when the variant replays its own routing − its surprisal|",
        ),
        notes=_notes(loaded, reference, pieces, whole, ours[0].n_experts, theirs[0].n_experts),
    )


def _metrics(whole: Whole, tokens: pd.DataFrame) -> tuple[Metric, ...]:
    pieces = whole.pieces
    bootstrap, n = pieces.bootstrap(), pieces.n_predicted
    found = []
    for name, attribute in (
        ("delta_loss", "delta"),
        ("weight_error", "weight_error"),
        ("routing_error", "routing_error"),
    ):
        interval = bootstrap.ratio(whole.sums(attribute), pieces.predicted_G)
        value = float(whole.sums(attribute).sum() / n)
        found.append(Metric(name, value, "nats/token", "lower", n, interval.low, interval.high, interval.how))
    overlap = float(np.nanmean(whole.overlap_LT))
    flipped = tokens[(tokens["verdict"] != "") & (tokens["flipped_layers"] > 0)]
    harmful = float((flipped["verdict"] == "harmful").mean()) if len(flipped) else 0.0
    return (
        *found,
        Metric("overlap", overlap, "share", "higher", whole.overlap_LT.size),
        Metric("harmful_share", harmful, "share of tokens with flips", "lower", len(flipped)),
    )


def _notes(
    loaded: LoadedModel, reference: LoadedModel, pieces: Pieces, whole: Whole, ours: int, theirs: int
) -> tuple[str, ...]:
    notes = [f"Original: {reference.ref}, variant: {loaded.ref}.", pieces.note]
    if ours != theirs:
        notes.append(
            f"The variant kept {ours} of {theirs} experts; where a replay asks for one that is gone, nobody answers, so "
            "what is missing counts as weight error."
        )
    if not np.isfinite(whole.margin_LT).any():
        notes.append(
            "This router's choice is not by its logits alone, so margins are not known and not shown."
        )
    return tuple(notes)


def _views(layer: int) -> tuple[View, ...]:
    parts = (
        "drift",
        "flipped_layers",
        "delta_nats",
        "weight_nats",
        "routing_nats",
        "top1_original",
        "top1_variant",
    )
    return (
        View(
            "bar",
            x="part",
            y="nats",
            frame="split",
            title="Loss added: by the weights, and by the routing they led to",
            unit="nats/token",
            tooltip=("low", "high"),
        ),
        View(
            "tokens",
            x="position",
            color="drift",
            text="token",
            frame="tokens",
            title="Share of experts that changed, mean over layers",
            unit="share",
            tooltip=(*parts[1:], "verdict"),
        ),
        View(
            "table",
            x="token",
            y="routing_nats",
            frame="ranked",
            title="Tokens that the routing changed most",
            tooltip=(
                "piece",
                "position",
                "target",
                *(part for part in parts if part != "routing_nats"),
                "verdict",
            ),
        ),
        View(
            "line",
            x="layer",
            y="overlap",
            frame="layers",
            title="Overlap of chosen experts by depth",
            unit="share",
            tooltip=("low", "high", "flipped_share", "weight_drift", "by_chance"),
        ),
        View(
            "heatmap",
            x="position",
            y="layer",
            color="overlap",
            text="experts_variant",
            title="Overlap by layer and position",
            unit="share",
            tooltip=("token", "experts_original", "experts_variant", "weight_drift", "margin"),
        ),
        View(
            "line",
            x="margin",
            y="flipped_share",
            frame="margins",
            title="Choices that flipped, by the original's margin",
            unit="share",
            tooltip=("margin_up_to", "share_of_flips", "choices"),
        ),
        View(
            "bar",
            x="verdict",
            y="share_of_tokens",
            frame="verdicts",
            title="What the flips did to predictions",
            unit="share",
            tooltip=("tokens", "routing_nats"),
        ),
        View(
            "flow",
            x="source",
            y="target",
            color="moved",
            frame="moved",
            title=f"Moved from and to in layer {layer}",
            unit="tokens",
        ),
        View(
            "heatmap",
            x="target",
            y="source",
            color="moved",
            frame="moved",
            title=f"Moves of layer {layer}, {MAX_EDGES} most used",
            unit="tokens",
        ),
    )
