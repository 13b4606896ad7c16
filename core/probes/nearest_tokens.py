"""Nearest tokens: which tokens' vectors lie closest to a residual, in the embedding or in the unembedding.

Legend: S layers (embedding, then after each block), P shown positions, R rows = S · P, V vocabulary, D d_model, K nearest.

Products with the whole vocabulary exist for a few rows at a time. It does not say what the model predicts: that is the
logit lens, which is the dot product with the unembedding after the final norm.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture_residual
from core.errors import BadInput, CannotMeasure, SlimscopeError
from core.lazy import torch
from core.probes._distribution import rows_at_once
from core.probes._provenance import provenance
from core.probes._tokens import Encoded, encode, limit_cells, token_texts
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Space = Literal["embedding", "unembedding"]
Measure = Literal["cosine", "dot"]


class NearestTokensSettings(Settings):
    """Which vectors are compared with which."""

    space: Space = Field(
        "embedding", description="The tokens' vectors: rows of the embedding or of the unembedding"
    )
    measure: Measure = Field("cosine", description="Closeness: cosine of the angle, or the dot product")
    read: Literal["raw", "normed"] = Field(
        "raw",
        description="raw: the residual as it is; normed: after the model's final norm, as its output is read",
    )
    layer: int = Field(-1, ge=-1, le=1024, description="Layer of the detailed list; -1 is the last")
    position: int = Field(-1, ge=-2048, le=2047, description="Position of the detailed list; -1 is the last")
    top_k: int = Field(10, ge=1, le=100, description="Tokens in the detailed list")
    positions: int = Field(
        64, ge=0, le=2048, description="Last positions of the prompt on the map; 0 shows all"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: NearestTokensSettings) -> Cost:
    """One forward pass, and every layer and position against the whole vocabulary."""
    shown = min(n_tokens, settings.positions or n_tokens)
    per_block = 4 * anatomy.d_model**2 + 3 * anatomy.d_model * anatomy.d_ff
    table = anatomy.vocab_size * anatomy.d_model
    forward = (anatomy.n_layers * per_block + table) * max(1, n_tokens)
    products = (anatomy.n_layers + 1) * shown * table
    return Cost(1 + products / forward, 4 * (2 * table + (anatomy.n_layers + 1) * shown * anatomy.d_model))


@method(
    "probe",
    title="Nearest tokens",
    needs=["text"],
    answers="What does this layer know?",
    examples=(
        Example(
            "How long does a position hold its own token?", Prompt("The capital of France"), {"layer": 0}
        ),
        Example(
            "From the token that is to the token that comes",
            Prompt("The capital of France is"),
            {"space": "unembedding", "read": "normed", "measure": "dot"},
        ),
    ),
    cost=_cost,
)
def nearest_tokens(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: NearestTokensSettings
) -> Result:
    """Find the tokens whose vectors lie nearest to the residual stream, at every layer and position.

    Cosine is h · w / (‖h‖ ‖w‖), dot is h · w, over all rows w of the embedding or the unembedding. At layer 0 the nearest
    row of the embedding is the token itself where nothing else was added to it; how long it stays nearest shows
    how long a position still holds its own token. The list gives one residual's nearest tokens by both measures.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    start = encoded.start(settings.positions)
    limit_cells(loaded.anatomy.n_layers + 1, encoded.n_tokens - start)
    layer, position = _place(loaded, encoded, settings)
    table = _Table.of(loaded, settings.space)
    with loaded.lock, torch.inference_mode():
        residual_SPD = _residuals(loaded, encoded, settings)
        main = _map(loaded, encoded, start, residual_SPD, table, settings, progress)
        found = _nearest(loaded, residual_SPD[layer, position], table, settings)
        gap = table.gap(residual_SPD[layer, position])
    at = f"{encoded.texts[position]!r}, position {position}, layer {layer}"
    return Result(
        frames={"main": main, "nearest": found},
        views=_views(settings, at),
        metrics=(
            Metric("nearest_is_itself", float(main["is_itself"].mean()), "share of cells", n=len(main)),
            Metric(
                "nearest_value", float(found[settings.measure].iloc[0]), settings.measure, n=table.n_tokens
            ),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="nearest_tokens",
            settings=settings,
            started=started,
            conditions={
                "tokens": encoded.n_tokens,
                "layer": layer,
                "position": position,
                "vocabulary": table.n_tokens,
            },
            exactness_gap=gap,
            exactness_check="largest |dot in the model's dtype − dot in float64| over the largest |dot|, listed residual",
        ),
        notes=_notes(loaded, settings),
    )


@dataclass(frozen=True)
class _Table:
    """The tokens' vectors."""

    rows_VD: Tensor
    norm_V: Tensor

    @classmethod
    def of(cls, loaded: LoadedModel, space: Space) -> _Table:
        """Rows of the embedding or unembedding; raises ``CannotMeasure`` where none can be read."""
        path = loaded.anatomy.embedding if space == "embedding" else loaded.anatomy.unembedding
        if path is None:
            raise CannotMeasure(f"{loaded.anatomy.architecture} has no unembedding; set space to embedding")
        weight = getattr(loaded.model.get_submodule(path), "weight", None)
        if not torch.is_tensor(weight) or not weight.is_floating_point():
            raise CannotMeasure(f"{path} is stored packed, its rows cannot be read; open the original model")
        return cls(weight, weight.float().norm(dim=-1).clamp(min=1e-12))

    @property
    def n_tokens(self) -> int:
        """V."""
        return len(self.rows_VD)

    def dots(self, vectors_RD: Tensor) -> Tensor:
        """[R, V] in float32."""
        dots_RV: Tensor = (vectors_RD.to(self.rows_VD.dtype) @ self.rows_VD.T).float()
        return dots_RV

    def closeness(self, vectors_RD: Tensor, measure: Measure) -> Tensor:
        """[R, V] in float32."""
        close_RV = self.dots(vectors_RD)
        if measure == "cosine":
            close_RV /= vectors_RD.float().norm(dim=-1, keepdim=True).clamp(min=1e-12) * self.norm_V
        return close_RV

    def gap(self, vector_D: Tensor) -> float:
        """How far the model's arithmetic is from float64, relative to the largest product; a part of the rows at a time."""
        dots_V = self.dots(vector_D[None])[0].double()
        parts = (rows.double() @ vector_D.double() for rows in torch.split(self.rows_VD, 8192))
        exact_V = torch.cat(list(parts))
        return float((dots_V - exact_V).abs().max() / exact_V.abs().max().clamp(min=1e-300))


def _place(loaded: LoadedModel, encoded: Encoded, settings: NearestTokensSettings) -> tuple[int, int]:
    """Layer and position of the list, counted from 0; raises ``BadInput``."""
    last = loaded.anatomy.n_layers
    if settings.layer > last:
        raise BadInput(f"layer {settings.layer} does not exist: {loaded.ref} has 0 to {last}")
    n = encoded.n_tokens
    if not -n <= settings.position < n:
        raise BadInput(f"position {settings.position} does not exist: the prompt has positions 0 to {n - 1}")
    return (last if settings.layer < 0 else settings.layer), settings.position % n


def _residuals(loaded: LoadedModel, encoded: Encoded, settings: NearestTokensSettings) -> Tensor:
    """[S, P, D], normed where asked."""
    with capture_residual(loaded) as residual:
        loaded.model(**encoded.inputs)
    residual_SPD = torch.stack([stream[0] for stream in residual.values()])
    if settings.read == "normed":
        for path in (loaded.anatomy.final_norm, loaded.anatomy.head_transform):
            if path is not None:
                residual_SPD = loaded.model.get_submodule(path)(residual_SPD)
    if not torch.isfinite(residual_SPD).all():
        raise SlimscopeError(
            "the residual stream is not finite (NaN or infinity), so it has no nearest token; "
            "open the model in float32, or check its weights"
        )
    return residual_SPD


def _map(
    loaded: LoadedModel,
    encoded: Encoded,
    start: int,
    residual_SPD: Tensor,
    table: _Table,
    settings: NearestTokensSettings,
    progress: Progress,
) -> pd.DataFrame:
    """One row per layer and shown position, layers outermost: its nearest token."""
    shown_SPD = residual_SPD[:, start:]
    n_layers, n, _ = shown_SPD.shape
    rows_RD = shown_SPD.flatten(0, 1)
    values, ids = [], []
    size = rows_at_once(table.n_tokens)
    for first in range(0, len(rows_RD), size):
        progress(first, len(rows_RD), "comparing with every token")
        top = table.closeness(rows_RD[first : first + size], settings.measure).max(-1)
        values.append(top.values)
        ids.append(top.indices)
    nearest = torch.cat(ids).tolist()
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(n_layers), n),
            "position": np.tile(np.arange(start, start + n), n_layers),
            "token": np.tile(np.array(encoded.texts[start:], dtype=object), n_layers),
            "nearest": token_texts(loaded.tokenizer, nearest),
            settings.measure: torch.cat(values).cpu().numpy(),
            "is_itself": np.array(nearest) == np.tile(encoded.ids[start:], n_layers),
        }
    )


def _nearest(
    loaded: LoadedModel, vector_D: Tensor, table: _Table, settings: NearestTokensSettings
) -> pd.DataFrame:
    """The nearest tokens of one residual by the chosen measure, with both measures and the rank by the other."""
    by_cosine_V = table.closeness(vector_D[None], "cosine")[0]
    by_dot_V = table.closeness(vector_D[None], "dot")[0]
    chosen_V, other_V = (by_cosine_V, by_dot_V) if settings.measure == "cosine" else (by_dot_V, by_cosine_V)
    ids = chosen_V.topk(min(settings.top_k, table.n_tokens)).indices
    return pd.DataFrame(
        {
            "rank": np.arange(1, len(ids) + 1),
            "token_id": ids.cpu().numpy(),
            "token": token_texts(loaded.tokenizer, ids.tolist()),
            "cosine": by_cosine_V[ids].cpu().numpy(),
            "dot": by_dot_V[ids].cpu().numpy(),
            "rank_by_other": [1 + int((other_V > other_V[token]).sum()) for token in ids],
            "row_norm": table.norm_V[ids].cpu().numpy(),
        }
    )


def _views(settings: NearestTokensSettings, at: str) -> tuple[View, ...]:
    return (
        View(
            "heatmap",
            x="position",
            y="layer",
            color=settings.measure,
            text="nearest",
            title=f"Nearest row of the {settings.space} at each layer and position",
            unit=settings.measure,
            tooltip=("token", "nearest", settings.measure, "is_itself"),
        ),
        View(
            "bar",
            x="token",
            y=settings.measure,
            frame="nearest",
            title=f"Nearest tokens of {at}",
            unit=settings.measure,
            tooltip=("rank", "cosine", "dot", "rank_by_other", "row_norm"),
        ),
        View(
            "table",
            x="rank",
            y=settings.measure,
            text="token",
            frame="nearest",
            title=f"Nearest tokens of {at}",
            tooltip=("cosine", "dot", "rank_by_other", "row_norm"),
        ),
    )


def _notes(loaded: LoadedModel, settings: NearestTokensSettings) -> tuple[str, ...]:
    notes = ["Layer 0 is the embedding; layer l is the residual stream after l blocks."]
    if settings.space == "embedding" and loaded.anatomy.position_embedding is not None:
        notes.append(
            "This model adds a position's vector to the embedding, so layer 0 is not the token's row itself."
        )
    if loaded.anatomy.tied:
        notes.append("Embedding and unembedding are one table in this model.")
    return tuple(notes)
