"""Attention patterns: what each head looks at, first as scores of all heads, then one head's map.

Legend: B batch (1), H heads, Q query positions, K key positions (both all positions of the prompt), D d_model.

Only one layer's patterns [H, Q, K] are alive at a time: each is reduced to a few numbers per head inside the hook,
and only the chosen head's map is kept. It does not say what a head writes: a pattern is not an explanation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture
from core.lazy import torch
from core.models.anatomy_verify import eager_attention
from core.models.fp32_path import fast_fp32
from core.models.weights import output_weight, split_heads, to_query_heads
from core.probes._head_scores import PAIR_SCORES, PatternScorer, check_head, value_norms
from core.probes._head_weights import at_least_float32
from core.probes._provenance import provenance
from core.probes._tokens import Encoded, encode
from core.registry import Example, Settings, method
from core.types import Cost, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

MAX_BINS_CAUSAL = 128
"""Bins per side of one head's map; its lower triangle is then at most 8,256 marks."""
MAX_BINS_FULL = 96
"""The same where all cells are shown: 9,216 marks."""


class AttentionPatternSettings(Settings):
    """Which head's map to show beside the overview of all heads."""

    layer: int = Field(0, ge=0, le=1023, description="Layer of the head whose map is shown, from 0")
    head: int = Field(0, ge=0, le=1023, description="Head whose map is shown, from 0")
    sources: int = Field(3, ge=1, le=4, description="Source tokens listed per query, the strongest first")


def _cost(anatomy: Anatomy, n_tokens: int, settings: AttentionPatternSettings) -> Cost:
    """One forward pass; three copies of one layer's patterns in float32."""
    return Cost(1, 3 * 4 * anatomy.n_heads * n_tokens**2)


@method(
    "probe",
    title="Attention pattern",
    needs=["text", "heads"],
    paper="https://arxiv.org/abs/2004.10102",
    answers="Which heads matter?",
    examples=(
        Example(
            "An induction head finds the earlier copy",
            Prompt(
                "When Mary and John went to the store, John gave a drink to Mary. When Mary and John went home,"
            ),
            {"layer": 18, "head": 6},
        ),
    ),
    cost=_cost,
)
def attention_pattern(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: AttentionPatternSettings
) -> Result:
    """Compare all heads by where they look, and show one head's map.

    A pattern is softmax(q · k / √d): for each query position, weights over key positions that sum to 1. Entropy (nats)
    says how spread it is, and its share is of the largest possible, ln(visible keys). The other scores are mean
    weights: on the previous token, on the first token (where many heads rest), on the token itself, and, when the
    prompt repeats itself, on the token after an earlier copy of the query (induction) and on that copy (duplicate).

    A weight alone misleads where the value it moves is short. The value-weighted pattern multiplies each weight with
    ‖v · W_O‖, the length of what the head adds to the residual stream from that position (Kobayashi et al. 2020), and
    is shown as a share of its row.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    check_head(loaded, settings.layer, settings.head)
    with (
        loaded.lock,
        torch.inference_mode(),
        eager_attention(loaded.model),
        fast_fp32(n_experts=loaded.anatomy.n_experts) as path,
    ):
        seen = _look(loaded, encoded, settings)
    main = pd.concat([seen.scores[layer] for layer in sorted(seen.scores)], ignore_index=True)
    causal = seen.scorer.causal
    return Result(
        frames={
            "main": main,
            "pattern": _pattern_frame(seen.map_QK, seen.moved_QK, encoded, causal=causal),
            "sources": _source_frame(seen.map_QK, seen.moved_QK, encoded, settings.sources),
            "tokens": _token_frame(seen.map_QK, seen.moved_QK, encoded, causal=causal),
        },
        views=_views(settings, seen.scorer.repeats),
        provenance=provenance(
            loaded,
            prompt,
            method="attention_pattern",
            settings=settings,
            started=started,
            conditions={
                "tokens": encoded.n_tokens,
                "fp32_path": path.name,
            },
            exactness_gap=max(seen.scorer.gap, seen.heads_gap),
            exactness_check="largest of |row sum − 1|, a decoder's weight on a later token, and |heads' sum − attention "
            "output| as a share of the largest output, at the chosen layer",
            attention_kernel="eager",
        ),
        notes=_notes(encoded, seen.scorer, len(seen.map_QK)),
    )


@dataclass
class _Seen:
    """What one forward pass left behind."""

    scorer: PatternScorer
    scores: dict[int, pd.DataFrame] = field(default_factory=dict)
    norms_HK: Tensor | None = None
    """Of the layer that runs now: its values come before its pattern."""
    map_QK: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    moved_QK: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    """The chosen head's weights times ‖v · W_O‖."""
    mixed_QD: Tensor | None = None
    """Σ_h A_h · V_h · W_O^h of the chosen layer."""
    heads_gap: float = 0.0


def _look(loaded: LoadedModel, encoded: Encoded, settings: AttentionPatternSettings) -> _Seen:
    """One forward pass; each layer's values, then its pattern, are reduced as they appear."""
    anatomy = loaded.anatomy
    blocks = anatomy.blocks
    seen = _Seen(PatternScorer(encoded.ids, causal=anatomy.causal, device=loaded.device))
    chosen = blocks[settings.layer]
    # A fused projection is q, k and v in one module, hooked once.
    of_value = {block.v: block for block in blocks}
    of_pattern = {block.attention: block for block in blocks}
    kept: dict[str, Tensor] = {}

    def see_values(path: str, v_BPX: Tensor) -> None:
        seen.norms_HK = value_norms(loaded, of_value[path], v_BPX)[0]
        if path == chosen.v:
            kept["v"] = v_BPX

    def see_pattern(path: str, pattern_BHQK: Tensor) -> None:
        block = of_pattern[path]
        pattern_HQK = at_least_float32(pattern_BHQK[0])
        assert seen.norms_HK is not None
        norms_HK = seen.norms_HK.to(pattern_HQK.dtype)
        scores = seen.scorer.score(pattern_HQK, window=anatomy.windows[block.index], norms_HK=norms_HK)
        columns = {name: values.cpu().numpy() for name, values in scores.items()}
        seen.scores[block.index] = pd.DataFrame(
            {"layer": block.index, "head": np.arange(anatomy.n_heads), **columns}
        )
        if block is chosen:
            map_QK = pattern_HQK[settings.head]
            seen.map_QK = map_QK.cpu().numpy()
            seen.moved_QK = (map_QK * norms_HK[settings.head]).cpu().numpy()
            values = to_query_heads(anatomy, split_heads(anatomy, kept["v"], "v"))[0]
            mixed_QHK = torch.einsum("hqp,phk->qhk", pattern_BHQK[0].to(values.dtype), values)
            seen.mixed_QD = torch.einsum(
                "qhk,hkd->qd", mixed_QHK, output_weight(loaded.model, anatomy, chosen)
            )

    with (
        capture(loaded.model, list(of_value), reduce=see_values),
        capture(loaded.model, list(of_pattern), reduce=see_pattern, item=1),
        capture(loaded.model, [chosen.o]) as written,
    ):
        loaded.model(**encoded.inputs, **({"logits_to_keep": 1} if anatomy.family == "decoder" else {}))
    assert seen.mixed_QD is not None
    bias_D = loaded.model.get_submodule(chosen.o).bias
    mixed_QD = seen.mixed_QD if bias_D is None else seen.mixed_QD + bias_D
    output_QD = written[chosen.o].reshape(mixed_QD.shape)
    seen.heads_gap = float((mixed_QD - output_QD).abs().max() / output_QD.abs().max())
    return seen


def _pattern_frame(
    map_QK: np.ndarray, moved_QK: np.ndarray, encoded: Encoded, *, causal: bool
) -> pd.DataFrame:
    """One head's map as rows, binned so that a browser can draw it; a causal map's empty half is left out.

    A bin's weight is summed over its keys and averaged over its queries, so that rows still sum to 1.
    """
    edges = _bin_edges(len(map_QK), MAX_BINS_CAUSAL if causal else MAX_BINS_FULL)
    binned, shared = _binned(map_QK, edges), _binned(_shares(moved_QK), edges)
    query, key = np.tril_indices(len(edges)) if causal else np.indices(binned.shape).reshape(2, -1)
    texts = np.array(encoded.texts, dtype=object)
    return pd.DataFrame(
        {
            "query": edges[query],
            "key": edges[key],
            "weight": binned[query, key],
            "weighted_share": shared[query, key],
            "query_token": texts[edges[query]],
            "key_token": texts[edges[key]],
        }
    )


def _bin_edges(n: int, most: int) -> np.ndarray:
    """First position of each bin: equal widths, at most ``most`` bins."""
    width = -(-n // most)
    return np.arange(0, n, width)


def _binned(map_QK: np.ndarray, edges: np.ndarray) -> np.ndarray:
    summed: np.ndarray = np.add.reduceat(np.add.reduceat(map_QK, edges, axis=1), edges, axis=0)
    averaged: np.ndarray = summed / np.diff([*edges, len(map_QK)])[:, None]
    return averaged


def _shares(moved_QK: np.ndarray) -> np.ndarray:
    """Each row as shares of its sum; a head that moves nothing keeps zeros."""
    total_Q1 = moved_QK.sum(-1, keepdims=True)
    shares_QK: np.ndarray = np.divide(moved_QK, total_Q1, out=np.zeros_like(moved_QK), where=total_Q1 > 0)
    return shares_QK


def _source_frame(map_QK: np.ndarray, moved_QK: np.ndarray, encoded: Encoded, n_sources: int) -> pd.DataFrame:
    """Per query the source tokens from which the head moves most, the last query first."""
    n = min(n_sources, len(map_QK))
    order_QN = np.argsort(-moved_QK, axis=1, kind="stable")[::-1, :n]
    query = np.repeat(np.arange(len(map_QK))[::-1], n)
    source = order_QN.ravel()
    texts = np.array(encoded.texts, dtype=object)
    frame = pd.DataFrame(
        {
            "query": query,
            "query_token": texts[query],
            "rank": np.tile(np.arange(1, n + 1), len(map_QK)),
            "source": source,
            "source_token": texts[source],
            "weight": map_QK[query, source],
            "weighted": moved_QK[query, source],
            "weighted_share": _shares(moved_QK)[query, source],
        }
    )
    return frame[map_QK[query, source] > 0].reset_index(drop=True)


def _token_frame(map_QK: np.ndarray, moved_QK: np.ndarray, encoded: Encoded, *, causal: bool) -> pd.DataFrame:
    """Per token, how much the chosen head looks at it, averaged over the queries that can see it."""
    n = len(map_QK)
    viewers = np.arange(n, 0, -1) if causal else np.full(n, n)
    return pd.DataFrame(
        {
            "position": np.arange(encoded.n_tokens),
            "token": encoded.texts,
            "mean_weight_received": map_QK.sum(0) / viewers,
            "mean_weighted_share_received": _shares(moved_QK).sum(0) / viewers,
        }
    )


def _views(settings: AttentionPatternSettings, repeats: bool) -> tuple[View, ...]:
    titles = {
        "entropy_share": "Entropy of each head, share of the largest possible",
        "previous_token_share": "Weight on the previous token",
        "first_token_share": "Weight on the first token",
        "first_token_weighted_share": "Weight on the first token, times what it moves",
        "self_share": "Weight on the token itself",
    }
    if repeats:
        induction, duplicate = PAIR_SCORES
        titles[induction] = "Weight on the token after an earlier copy (induction)"
        titles[duplicate] = "Weight on an earlier copy"
    tooltip = ("entropy_nats", *titles)
    overview = tuple(
        View("heatmap", x="head", y="layer", color=name, title=title, unit="share", tooltip=tooltip)
        for name, title in titles.items()
    )
    name = f"Layer {settings.layer}, head {settings.head}"
    scatter = View(
        "scatter",
        x="previous_token_share",
        y="entropy_nats",
        color="layer",
        title="Heads by what they look at",
        unit="nats",
        tooltip=("layer", "head", *tooltip),
    )
    maps = tuple(
        View(
            "heatmap",
            x="key",
            y="query",
            color=column,
            frame="pattern",
            title=title,
            unit=unit,
            tooltip=("query_token", "key_token", "weight", "weighted_share"),
        )
        for column, title, unit in (
            ("weight", name, "weight"),
            ("weighted_share", f"{name}: weight times what it moves", "share"),
        )
    )
    sources = View(
        "table",
        x="query",
        y="weighted_share",
        text="source_token",
        frame="sources",
        title=f"{name}: where each query's output comes from",
        tooltip=("query_token", "rank", "source", "weight", "weighted"),
    )
    tokens = View(
        "tokens",
        x="position",
        color="mean_weight_received",
        text="token",
        frame="tokens",
        title=f"{name}: weight received by each token",
        unit="weight",
        tooltip=("mean_weighted_share_received",),
    )
    return (*overview, scatter, *maps, sources, tokens)


def _notes(encoded: Encoded, scorer: PatternScorer, n: int) -> tuple[str, ...]:
    notes = ["Patterns come from eager attention; the model's own kernel was put back afterwards."]
    if not scorer.repeats:
        notes.append("No token of the prompt repeats with room for a successor, so induction is not scored.")
    most = MAX_BINS_CAUSAL if scorer.causal else MAX_BINS_FULL
    if n > most:
        width = -(-n // most)
        notes.append(f"The map is binned by {width} tokens: weights summed over keys, averaged over queries.")
    return tuple(notes)
