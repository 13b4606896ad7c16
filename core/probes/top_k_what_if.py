"""What if every token were given more experts, or fewer?

Legend: K numbers of experts per token, S pieces of text, G documents.

The router itself chooses and weighs the k best, as it would with another k in its config; nothing else changes. How
many experts one token needs is ``expert_swap.py``.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.evaluate._intervals import Interval
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._provenance import provenance
from core.probes._rerouted import Floats, Pieces, Predicted, numbers, predict, runs_cost
from core.probes._routed_text import TextSettings
from core.registry import Example, method
from core.routing.discover import MoeLayer, moe_layers
from core.routing.lens import Change, routed
from core.routing.traffic import Traffic
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class TopKWhatIfSettings(TextSettings):
    """Which numbers of experts to try, on which text."""

    experts_per_token: str = Field(
        "", description="Numbers of experts per token to try, e.g. 1, 2, 4; empty: 1 to all of them"
    )
    max_tokens: int = Field(
        2048, ge=64, le=65_536, description="Tokens of the text that are predicted at most"
    )
    tolerance: float = Field(
        0.02, ge=0, le=10, description="Loss, in nats per token, that one would give for fewer experts"
    )
    weight_bits: float = Field(
        16, ge=1, le=32, description="Bits per weight of the model as deployed, for the bytes read"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: TopKWhatIfSettings) -> Cost:
    """One pass over the text per number tried, one of the original."""
    tried = numbers(settings.experts_per_token, what="experts_per_token", allowed=_counts(anatomy.n_experts))
    return runs_cost(anatomy, n_tokens, settings, 1 + len(tried))


def _counts(most: int) -> range:
    return range(1, most + 1)


@method(
    "probe",
    title="Top-k what-if",
    needs=["decoder", "text", "moe"],
    paper="https://arxiv.org/abs/2509.02753",
    answers="What if it routed otherwise?",
    examples=(
        Example("Text of every domain", Prompt("(the text is read instead)")),
        Example(
            "One expert or two, on code", Prompt("(the text is read instead)"), {"text": "domain:python"}
        ),
    ),
    cost=_cost,
)
def top_k_what_if(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: TopKWhatIfSettings
) -> Result:
    """Route every token to k experts, for every k, and see what predictions and bytes that makes.

    ΔNLL is the mean surprisal of the text's tokens with k experts minus that of the model as it is, in nats per
    token; agreement is the share of tokens whose most likely next token stayed. The interval resamples documents, both
    routings on the same draws. Decoding one token reads b · (dense + Σ_layers k · expert) bytes, with b the bytes per
    weight: k is what a bandwidth-bound machine pays for. A model was trained with one k: more is not better by itself.
    """
    started = time.perf_counter()
    layers = moe_layers(loaded)
    most = min(layer.n_experts // layer.n_groups * layer.top_groups for layer in layers)
    tried = numbers(settings.experts_per_token, what="experts_per_token", allowed=_counts(most))
    with loaded.lock, torch.inference_mode(), fast_fp32(n_experts=loaded.anatomy.n_experts) as path:
        pieces = Pieces.of(loaded, prompt, settings)
        total = (1 + len(tried)) * len(pieces.ids)
        base = _predict_all(loaded, pieces, Change(), progress, total, 0)
        others = {}
        for number, k in enumerate(tried, 1):
            others[k] = _predict_all(loaded, pieces, Change(top_k=k), progress, total, number)
    traffic = Traffic.of(loaded, bits=settings.weight_bits)
    original = {layer.layer: layer.top_k for layer in layers}
    frame = _frame(pieces, base, others, traffic, original)
    same = [k for k in tried if set(original.values()) == {k}]
    gap = max((float(np.abs(_nats(others[k]) - _nats(base)).max()) for k in same), default=None)
    return Result(
        frames={"main": frame},
        views=_VIEWS,
        metrics=_metrics(frame, pieces, base, settings.tolerance),
        provenance=provenance(
            loaded,
            prompt,
            method="top_k_what_if",
            settings=settings,
            started=started,
            conditions={**pieces.conditions, "fp32_path": path.name},
            exactness_gap=gap,
            exactness_check="largest |surprisal with the original k set − surprisal of the untouched model| of a piece",
        ),
        notes=(pieces.note, _original_note(layers), *_limit_note(layers, most)),
    )


_VIEWS = (
    View(
        "line",
        x="experts_per_token",
        y="delta_nats",
        title="Loss added by k experts per token",
        unit="nats/token",
        midpoint=0.0,
        tooltip=("low", "high", "agreement", "bytes_per_token"),
    ),
    View(
        "line",
        x="bytes_per_token",
        y="delta_nats",
        title="Loss added against bytes read per decoded token",
        unit="nats/token",
        tooltip=("experts_per_token", "share_of_bytes"),
    ),
    View(
        "table",
        x="experts_per_token",
        y="delta_nats",
        title="All numbers of experts",
        tooltip=(
            "original",
            "nats",
            "low",
            "high",
            "agreement",
            "agreement_low",
            "agreement_high",
            "bytes_per_token",
            "share_of_bytes",
        ),
    ),
)


def _predict_all(
    loaded: LoadedModel, pieces: Pieces, change: Change, progress: Progress, total: int, number: int
) -> list[Predicted]:
    found: list[Predicted] = []
    for ids_T in pieces.ids:
        k = "the model's own" if change.top_k is None else change.top_k
        progress(number * len(pieces.ids) + len(found), total, f"predicting with {k} experts per token")
        with routed(loaded, change=change):
            found.append(predict(loaded, ids_T))
    return found


def _nats(predicted: list[Predicted]) -> Floats:
    """Each piece's surprisal, [S]."""
    return np.array([piece.nats_N.sum() for piece in predicted])


def _frame(
    pieces: Pieces,
    base: list[Predicted],
    others: dict[int, list[Predicted]],
    traffic: Traffic,
    original: dict[int, int],
) -> pd.DataFrame:
    bootstrap, predicted_G = pieces.bootstrap(), pieces.predicted_G
    rows = []
    for k, found in others.items():
        is_original = set(original.values()) == {k}
        delta_G = pieces.per_document(_nats(found) - _nats(base))
        agreed_G = pieces.per_document([(a.top_N == b.top_N).sum() for a, b in zip(found, base, strict=True)])
        loss = bootstrap.ratio(delta_G, predicted_G)
        agreement = bootstrap.share(agreed_G, predicted_G)
        if is_original:
            loss, agreement = (Interval.exact(value, "the same routing") for value in (0.0, 1.0))
        rows.append(
            {
                "experts_per_token": k,
                "original": "as trained" if is_original else "",
                "nats": float(_nats(found).sum() / pieces.n_predicted),
                "delta_nats": float(delta_G.sum() / pieces.n_predicted),
                "low": loss.low,
                "high": loss.high,
                "agreement": float(agreed_G.sum() / pieces.n_predicted),
                "agreement_low": agreement.low,
                "agreement_high": agreement.high,
                "bytes_per_token": traffic.per_token(k),
                "share_of_bytes": traffic.per_token(k) / traffic.per_token(original),
            }
        )
    ends = dict.fromkeys(("low", "high", "agreement_low", "agreement_high"), "float64")
    return pd.DataFrame(rows).astype(ends)


def _metrics(
    frame: pd.DataFrame, pieces: Pieces, base: list[Predicted], tolerance: float
) -> tuple[Metric, ...]:
    """The untouched loss, and the fewest experts that cost no more than the tolerance, with their price."""
    loss = pieces.bootstrap().ratio(pieces.per_document(_nats(base)), pieces.predicted_G)
    n = pieces.n_predicted
    value = float(_nats(base).sum() / n)
    found = [Metric("loss", value, "nats/token", "lower", n, loss.low, loss.high, loss.how)]
    worst = frame["high"].fillna(frame["delta_nats"])
    enough = frame[worst <= tolerance]
    if len(enough):
        first = enough.iloc[0]
        found += [
            Metric("fewest_experts", float(first["experts_per_token"]), "experts/token", "lower", n),
            Metric("share_of_bytes", float(first["share_of_bytes"]), "share", "lower"),
        ]
    return tuple(found)


def _original_note(layers: tuple[MoeLayer, ...]) -> str:
    counts = " or ".join(map(str, sorted({layer.top_k for layer in layers})))
    return f"The model was trained with {counts} experts per token; routing weights are normalized as its router does."


def _limit_note(layers: tuple[MoeLayer, ...], most: int) -> tuple[str, ...]:
    if most == min(layer.n_experts for layer in layers):
        return ()
    return (
        f"Its router lets a token choose from some groups of experts only, so {most} per token are the most.",
    )
