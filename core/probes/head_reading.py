"""What one head looks for and what it moves: its QK and OV circuits on a prompt and in its weights.

Legend: P positions, H heads, K head_dim, D d_model, V vocabulary.

QK says which key a query looks for, OV what is written once it looks there (Elhage et al. 2021). Logits are direct:
what a head writes goes straight to the model's final norm, whose scale is frozen at the query, and its unembedding;
what later layers make of it is not seen here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.probes._head_on_prompt import MAX_SOURCES, Source, observe, ov_frames, pair_frame
from core.probes._head_scores import check_head
from core.probes._head_weights import (
    HeadWeights,
    chance_composition,
    composition,
    copying,
    eigenvalues,
    head_weights,
    token_interaction,
)
from core.probes._provenance import provenance
from core.probes._tokens import Encoded, encode
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class HeadReadingSettings(Settings):
    """Which head, read from which position."""

    layer: int = Field(0, ge=0, le=1023, description="Layer of the head, from 0")
    head: int = Field(0, ge=0, le=1023, description="Head, from 0")
    query: int = Field(
        -1, ge=-2048, le=2047, description="Position that looks, from 0; negative counts from the end"
    )
    source: Source = Field(
        "stream",
        description="What OV is read from at each source: stream is what the head really reads there, embedding only the token",
    )
    pairs: int = Field(40, ge=5, le=200, description="Query-key pairs listed, the best match first")
    top_k: int = Field(5, ge=1, le=10, description="Promoted tokens listed per source token")
    skip_first: bool = Field(
        True, description="Leave the first position out of the pairs: many heads rest there"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: HeadReadingSettings) -> Cost:
    """One forward pass, the unembedding of every source, and all layers' weights widened one after another."""
    scores = 4 * 4 * anatomy.n_heads * n_tokens**2
    return Cost(3, scores + 4 * anatomy.vocab_size * anatomy.d_model * 2)


@method(
    "probe",
    title="Head reading",
    needs=["decoder", "text", "heads"],
    paper="https://transformer-circuits.pub/2021/framework/index.html",
    answers="Which heads matter?",
    examples=(
        Example(
            "What an induction head copies",
            Prompt("When Mary and John went to the store, John gave a drink to Mary. When Mary and John"),
            {"layer": 18, "head": 6},
        ),
        Example(
            "A previous-token head matches neighbours",
            Prompt("The quick brown fox jumps over the lazy dog near the quiet river bank"),
            {"layer": 16, "head": 0},
        ),
    ),
    cost=_cost,
)
def head_reading(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: HeadReadingSettings
) -> Result:
    """Read one head: which pairs of tokens match, and what it writes when it looks at a token.

    QK: the pre-softmax score q · k / √d of each pair of positions, rebuilt from the residual stream through norms,
    projections, rotary positions, scale and softcap, and checked against the model's own. A softmax only sees
    differences within a row, so pairs are ranked by how far their score is above the mean of what the query sees.

    OV: the value v of each source token times W_O is what the head adds to the stream per unit of attention. Through
    the final norm (its scale frozen at the query) and the unembedding it becomes logits, given above their mean over
    the vocabulary. Weight times logit is the head's direct effect from that source; own rank 1 means that the head
    promotes the very token it looks at. Copying is Σλ / Σ|λ| of W_U · W_OV · W_E, and composition the share
    ‖W_1 W_2‖ / (‖W_1‖ ‖W_2‖) of an earlier head's output that this head's query, key or value reads.
    """
    started = time.perf_counter()
    check_head(loaded, settings.layer, settings.head)
    encoded = encode(loaded, prompt)
    query = _query(settings.query, encoded.n_tokens)
    with loaded.lock, torch.inference_mode():
        progress(0, 3, "reading the head on the prompt")
        seen = observe(loaded, encoded, layer=settings.layer, head=settings.head, source=settings.source)
        progress(1, 3, "unembedding what it moves")
        sources, promoted = ov_frames(loaded, encoded, seen, query, top_k=settings.top_k)
        progress(2, 3, "comparing weights with earlier heads")
        weights = _weights(loaded, settings)
    frames = {
        "sources": sources,
        "promoted": promoted,
        "pairs": pair_frame(encoded, seen, pairs=settings.pairs, skip_first=settings.skip_first),
        "eigenvalues": weights.eigenvalues,
    }
    if settings.layer:
        frames |= {"composition": weights.composition, "composition_map": weights.map}
    return Result(
        frames=frames,
        views=_views(settings, encoded, query),
        metrics=(
            Metric("ov_copying", weights.copying, "ratio"),
            Metric("composition_by_chance", weights.chance, "ratio", n=32),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="head_reading",
            settings=settings,
            started=started,
            conditions={"tokens": encoded.n_tokens, "query": query},
            exactness_gap=max(seen.scores_gap, seen.heads_gap),
            exactness_check="larger of |rebuilt − captured pre-softmax scores| and |heads' sum − attention output|, all heads "
            "of the layer, as a share of the largest value",
            attention_kernel="eager",
        ),
        notes=_notes(loaded.anatomy, encoded, settings),
    )


def _query(wanted: int, n: int) -> int:
    query = wanted + n if wanted < 0 else wanted
    if not 0 <= query < n:
        raise BadInput(f"query {wanted} does not exist: the prompt has {n} tokens; take {-n} to {n - 1}")
    return query


@dataclass(frozen=True)
class _Weights:
    """What the weights alone say."""

    copying: float
    chance: float
    eigenvalues: pd.DataFrame
    composition: pd.DataFrame
    """Earlier heads ranked by the strongest of the three scores."""
    map: pd.DataFrame


def _weights(loaded: LoadedModel, settings: HeadReadingSettings) -> _Weights:
    """OV eigenvalues through the vocabulary, and composition with every head of every earlier layer."""
    model, anatomy = loaded.model, loaded.anatomy
    head = settings.head
    chosen = head_weights(model, anatomy, anatomy.blocks[settings.layer])
    o_KD, v_DK = chosen.o_HKD[head], chosen.v_HDK[head]
    token_DD = token_interaction(model, anatomy)
    lambda_K = eigenvalues(o_KD @ token_DD @ v_DK)
    scale = o_KD.norm() * token_DD.norm() * v_DK.norm()
    largest = float(lambda_K.abs().max()) or 1.0
    values = lambda_K[lambda_K.abs().argsort(descending=True)].numpy() / largest
    frame = pd.DataFrame({"real": values.real, "imaginary": values.imag, "size": np.abs(values)})
    rows = [
        _composed(chosen, head, head_weights(model, anatomy, block), block.index)
        for block in anatomy.blocks[: settings.layer]
    ]
    map_ = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()
    ranked = map_
    if rows:
        strongest = map_[["q_composition", "k_composition", "v_composition"]].max(axis=1)
        ranked = map_.assign(strongest=strongest).sort_values(
            "strongest", ascending=False, ignore_index=True
        )[:50]
    chance = chance_composition(anatomy.d_model, anatomy.head_dim)
    return _Weights(float(copying(lambda_K, scale)), chance, frame, ranked, map_)


def _composed(chosen: HeadWeights, head: int, earlier: HeadWeights, layer: int) -> pd.DataFrame:
    scores = composition(chosen, head, earlier)
    n = len(earlier.o_HKD)
    columns: dict[str, Any] = {"layer": layer, "head": np.arange(n)}
    columns["name"] = [f"L{layer}H{index}" for index in range(n)]
    return pd.DataFrame(columns | {f"{k}_composition": v.float().cpu().numpy() for k, v in scores.items()})


def _views(settings: HeadReadingSettings, encoded: Encoded, query: int) -> tuple[View, ...]:
    name = f"Layer {settings.layer}, head {settings.head}"
    at = f"position {query}"
    composed = [f"{part}_composition" for part in "qkv"] if settings.layer else []
    views = [
        View(
            "table",
            x="source",
            y="weight",
            text="source_token",
            frame="sources",
            title=f"{name}: what it writes for each token it may look at, from {at}",
            tooltip=("promoted", "promoted_logit", "effect", "own_logit", "own_rank", "suppressed"),
        ),
        View(
            "table",
            x="query_token",
            y="above_row_mean",
            text="key_token",
            frame="pairs",
            title=f"{name}: the pairs of tokens that match best",
            tooltip=("query", "key", "score", "weight"),
        ),
        View(
            "tokens",
            x="source",
            color="weight",
            text="source_token",
            frame="sources",
            title=f"{name}: where {at} looks",
            unit="weight",
            tooltip=("promoted", "effect", "own_rank"),
        ),
        View(
            "scatter",
            x="real",
            y="imaginary",
            color="size",
            frame="eigenvalues",
            title=f"{name}: eigenvalues of W_U · OV · W_E, as shares of the largest",
            unit="ratio",
        ),
    ]
    if composed:
        views.append(
            View(
                "table",
                x="name",
                y="strongest",
                frame="composition",
                title=f"{name}: earlier heads that it reads",
                tooltip=tuple(composed),
            )
        )
    words = {"q": "query", "k": "key", "v": "value"}
    views += [
        View(
            "heatmap",
            x="head",
            y="layer",
            color=column,
            frame="composition_map",
            title=f"{name}: its {words[column[0]]} reads earlier heads",
            unit="ratio",
            tooltip=("name", *composed),
        )
        for column in composed
    ]
    return tuple(views)


def _notes(anatomy: Anatomy, encoded: Encoded, settings: HeadReadingSettings) -> tuple[str, ...]:
    notes = [
        "Logits are direct effects above their mean over the vocabulary; later layers are not seen, nor is a softcap.",
        "Copying and composition come from weights alone: without positions, biases and q/k norms.",
    ]
    if not settings.layer:
        notes.append("Layer 0 has no earlier heads to be composed with.")
    if encoded.n_tokens > MAX_SOURCES:
        notes.append(f"The {MAX_SOURCES} sources with the largest weight are read, of {encoded.n_tokens}.")
    if settings.source == "embedding":
        notes.append(
            "Sources are read as their token embedding alone: what layers before the head added is left out."
        )
    return tuple(notes)
