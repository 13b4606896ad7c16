"""Attention patterns: what each head looks at, first as scores of all heads, then one head's map.

Legend: H heads, Q query positions, K key positions (both all positions of the prompt).

Only one layer's patterns [H, Q, K] are alive at a time: each is reduced to a few numbers per head inside the hook,
and only the chosen head's map is kept. Scores follow the head detectors of Olsson et al. 2022. It does not say
what a head writes: a pattern is not an explanation.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture
from core.errors import BadInput
from core.lazy import torch
from core.models.anatomy_verify import eager_attention
from core.probes._provenance import provenance
from core.probes._tokens import Encoded, encode
from core.registry import Settings, method
from core.types import Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

MAX_BINS_CAUSAL = 128
"""Bins per side of one head's map; its lower triangle is then at most 8,256 marks."""
MAX_BINS_FULL = 96
"""The same where all cells are shown: 9,216 marks."""


class AttentionPatternSettings(Settings):
    """Which head's map to show beside the overview of all heads."""

    layer: int = Field(0, ge=0, le=1023, description="Layer of the head whose map is shown, from 0")
    head: int = Field(0, ge=0, le=1023, description="Head whose map is shown, from 0")


@method("probe", title="Attention pattern", needs=["text"], paper="https://arxiv.org/abs/2209.11895")
def attention_pattern(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: AttentionPatternSettings
) -> Result:
    """Compare all heads by where they look, and show one head's map.

    A pattern is softmax(q · k / √d): for each query position, weights over key positions that sum to 1. Entropy (nats)
    says how spread it is, and its share is of the largest possible, ln(visible keys). The other scores are mean
    weights: on the previous token, on the first token (where many heads rest), on the token itself, and, when the
    prompt repeats itself, on the token after an earlier copy of the query (induction) and on that copy (duplicate).
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    anatomy = loaded.anatomy
    _check_head(loaded, settings)
    layer_of = {block.attention: block.index for block in anatomy.blocks}
    scorer = _Scorer(encoded, causal=anatomy.family == "decoder", device=loaded.device)
    chosen = anatomy.blocks[settings.layer].attention
    kept: dict[str, np.ndarray] = {}

    def reduce(path: str, pattern_BHQK: Tensor) -> pd.DataFrame:
        pattern_HQK = pattern_BHQK[0].float()
        if path == chosen:
            kept["map"] = pattern_HQK[settings.head].cpu().numpy()
        return scorer.score(pattern_HQK, layer=layer_of[path], window=anatomy.windows[layer_of[path]])

    with (
        loaded.lock,
        torch.inference_mode(),
        eager_attention(loaded.model),
        capture(loaded.model, list(layer_of), reduce=reduce, item=1) as scores,
    ):
        loaded.model(**encoded.inputs)
    map_QK = kept["map"]
    frames = {
        "main": pd.concat([scores[path] for path in layer_of], ignore_index=True),
        "pattern": _pattern_frame(map_QK, encoded, causal=scorer.causal),
        "tokens": _token_frame(map_QK, encoded),
    }
    return Result(
        frames=frames,
        views=_views(settings, scorer.repeats),
        provenance=provenance(
            loaded,
            prompt,
            method="attention_pattern",
            settings=settings,
            started=started,
            conditions={"tokens": encoded.n_tokens, "threads": torch.get_num_threads()},
            exactness_gap=scorer.gap,
            exactness_check="largest |row sum − 1|, and for a decoder the largest weight on a later token",
            attention_kernel="eager",
        ),
        notes=_notes(encoded, scorer, len(map_QK)),
    )


def _check_head(loaded: LoadedModel, settings: AttentionPatternSettings) -> None:
    anatomy = loaded.anatomy
    for name, value, n in (
        ("layer", settings.layer, anatomy.n_layers),
        ("head", settings.head, anatomy.n_heads),
    ):
        if value >= n:
            raise BadInput(f"{name} {value} does not exist: {loaded.ref} has {n}, from 0 to {n - 1}")


class _Scorer:
    """Reduces one layer's patterns to scores per head; remembers how far rows are from summing to 1."""

    def __init__(self, encoded: Encoded, *, causal: bool, device: str) -> None:
        self.causal = causal
        self.gap = 0.0
        ids_P = torch.tensor(encoded.ids, device=device)
        n = len(ids_P)
        self._n = n
        same_QK = (ids_P[:, None] == ids_P[None, :]).tril(-1)
        # The key after an earlier copy; the query itself is no successor worth a score (it is the self share).
        after_QK = torch.zeros_like(same_QK)
        after_QK[:, 1:] = same_QK[:, :-1]
        after_QK &= torch.ones_like(after_QK).tril(-1)
        self._copies = {
            "induction_score": _mask_of_rows(after_QK),
            "duplicate_token_score": _mask_of_rows(same_QK),
        }
        self.repeats = bool(after_QK.any())

    def score(self, pattern_HQK: Tensor, *, layer: int, window: int | None) -> pd.DataFrame:
        """One row per head."""
        self.gap = max(self.gap, float((pattern_HQK.sum(-1) - 1).abs().max()))
        if self.causal:
            self.gap = max(self.gap, float(pattern_HQK.triu(1).abs().max()))
        entropy_HQ = -torch.xlogy(pattern_HQK, pattern_HQK).sum(-1)
        most_Q = self._visible_keys(window).to(entropy_HQ).log()
        several_Q = most_Q > 0
        scores = {
            "entropy_nats": entropy_HQ.mean(-1),
            "entropy_share": (entropy_HQ / most_Q)[:, several_Q].mean(-1),
            "previous_token_share": pattern_HQK.diagonal(-1, 1, 2).mean(-1),
            "first_token_share": pattern_HQK[:, 1:, 0].mean(-1),
            "self_share": pattern_HQK.diagonal(0, 1, 2).mean(-1),
            **{name: _mean_weight(pattern_HQK, *copies) for name, copies in self._copies.items()},
        }
        n_heads = len(pattern_HQK)
        columns = {name: values.cpu().numpy() for name, values in scores.items()}
        return pd.DataFrame({"layer": [layer] * n_heads, "head": range(n_heads), **columns})

    def _visible_keys(self, window: int | None) -> Tensor:
        """How many keys each query may look at."""
        if not self.causal:
            return torch.full((self._n,), self._n)
        return torch.arange(1, self._n + 1).clamp(max=window or self._n)


def _mask_of_rows(mask_QK: Tensor) -> tuple[Tensor, Tensor]:
    """A mask, and which of its rows have any key."""
    return mask_QK, mask_QK.any(-1)


def _mean_weight(pattern_HQK: Tensor, mask_QK: Tensor, rows_Q: Tensor) -> Tensor:
    """Weight on the masked keys, averaged over queries that have one; NaN where none has."""
    return (pattern_HQK * mask_QK).sum(-1)[:, rows_Q].mean(-1)


def _pattern_frame(map_QK: np.ndarray, encoded: Encoded, *, causal: bool) -> pd.DataFrame:
    """One head's map as rows, binned so that a browser can draw it; a causal map's empty half is left out.

    A bin's weight is summed over its keys and averaged over its queries, so that rows still sum to 1.
    """
    edges = _bin_edges(len(map_QK), MAX_BINS_CAUSAL if causal else MAX_BINS_FULL)
    summed = np.add.reduceat(np.add.reduceat(map_QK, edges, axis=1), edges, axis=0)
    queries_per_bin = np.diff([*edges, len(map_QK)])
    binned = summed / queries_per_bin[:, None]
    query, key = np.tril_indices(len(edges)) if causal else np.indices(binned.shape).reshape(2, -1)
    texts = np.array(encoded.texts, dtype=object)
    return pd.DataFrame(
        {
            "query": edges[query],
            "key": edges[key],
            "weight": binned[query, key],
            "query_token": texts[edges[query]],
            "key_token": texts[edges[key]],
        }
    )


def _bin_edges(n: int, most: int) -> np.ndarray:
    """First position of each bin: equal widths, at most ``most`` bins."""
    width = -(-n // most)
    return np.arange(0, n, width)


def _token_frame(map_QK: np.ndarray, encoded: Encoded) -> pd.DataFrame:
    """Per token, how much the chosen head looks at it, averaged over the queries that can see it."""
    received = map_QK.sum(0) / np.count_nonzero(map_QK, axis=0).clip(min=1)
    return pd.DataFrame(
        {
            "position": np.arange(encoded.n_tokens),
            "token": encoded.texts,
            "mean_weight_received": received,
        }
    )


def _views(settings: AttentionPatternSettings, repeats: bool) -> tuple[View, ...]:
    titles = {
        "entropy_share": "Entropy of each head, share of the largest possible",
        "previous_token_share": "Weight on the previous token",
        "first_token_share": "Weight on the first token",
        "self_share": "Weight on the token itself",
    }
    if repeats:
        titles["induction_score"] = "Weight on the token after an earlier copy (induction)"
        titles["duplicate_token_score"] = "Weight on an earlier copy"
    tooltip = ("entropy_nats", *titles)
    overview = tuple(
        View("heatmap", x="head", y="layer", color=name, title=title, unit="share", tooltip=tooltip)
        for name, title in titles.items()
    )
    name = f"Layer {settings.layer}, head {settings.head}"
    return (
        *overview,
        View(
            "scatter",
            x="previous_token_share",
            y="entropy_nats",
            color="layer",
            title="Heads by what they look at",
            unit="nats",
            tooltip=("layer", "head", *tooltip),
        ),
        View(
            "heatmap",
            x="key",
            y="query",
            color="weight",
            frame="pattern",
            title=name,
            unit="weight",
            tooltip=("query_token", "key_token"),
        ),
        View(
            "tokens",
            x="position",
            color="mean_weight_received",
            text="token",
            frame="tokens",
            title=f"{name}: weight received by each token",
            unit="weight",
        ),
    )


def _notes(encoded: Encoded, scorer: _Scorer, n: int) -> tuple[str, ...]:
    notes = ["Patterns come from eager attention; the model's own kernel was put back afterwards."]
    if not scorer.repeats:
        notes.append("No token of the prompt repeats with room for a successor, so induction is not scored.")
    most = MAX_BINS_CAUSAL if scorer.causal else MAX_BINS_FULL
    if n > most:
        width = -(-n // most)
        notes.append(f"The map is binned by {width} tokens: weights summed over keys, averaged over queries.")
    return tuple(notes)
