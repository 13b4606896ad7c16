"""Residual map: the residual stream of all layers and positions, drawn in the plane that holds most of its variance.

Legend: S shown layers, P shown positions, N = S · P vectors, D d_model, K components.

Principal components are exact (singular value decomposition in float64). It shows distances that survive in few
dimensions and says how much of the variance that is; it does not say what a direction means.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.capture import capture_residual
from core.errors import BadInput, SlimscopeError
from core.lazy import torch
from core.probes._provenance import provenance
from core.probes._tokens import Encoded, encode, limit_cells
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

COMPONENTS = 10
"""Shown in the table of explained variance; the map draws the first two, a third is in its tooltip."""
MAX_VECTORS = 4_000
"""The decomposition takes about 4 · N · D · min(N, D) operations."""


class ResidualMapSettings(Settings):
    """What is laid out, and how it is measured."""

    positions: int = Field(64, ge=0, le=2048, description="Last positions of the prompt to show; 0 shows all")
    layer_stride: int = Field(1, ge=1, le=64, description="Show every n-th layer; the last is always shown")
    scale: Literal["unit", "none"] = Field(
        "unit",
        description="unit: every vector divided by its norm, so that a few huge ones do not fill the map; none: as it is",
    )
    centre: Literal["all", "layer"] = Field(
        "all",
        description="all: subtract the mean of all vectors; layer: each layer's own mean, so that tokens are compared, "
        "not layers",
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: ResidualMapSettings) -> Cost:
    """One forward pass and the decomposition."""
    layers = anatomy.n_layers // settings.layer_stride + 1
    n = layers * min(n_tokens, settings.positions or n_tokens)
    per_block = 4 * anatomy.d_model**2 + 3 * anatomy.d_model * anatomy.d_ff
    forward = 2 * (anatomy.n_layers * per_block + anatomy.vocab_size * anatomy.d_model) * max(1, n_tokens)
    decomposition = 8 * n * anatomy.d_model * min(n, anatomy.d_model)
    return Cost(1 + decomposition / forward, 3 * 8 * n * anatomy.d_model)


@method(
    "probe",
    title="Residual map",
    needs=["text"],
    answers="What did it compute?",
    examples=(
        Example(
            "Countries and capitals part from the words between them",
            Prompt("Paris is in France. Rome is in Italy. Madrid is in Spain. Berlin is in Germany."),
            {"centre": "layer"},
        ),
        Example(
            "How far each layer carries a token",
            Prompt("When Mary and John went to the store, John gave a drink to"),
        ),
    ),
    cost=_cost,
)
def residual_map(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ResidualMapSettings
) -> Result:
    """Lay out every residual vector of the prompt in its first principal components.

    One point per layer and position: h − mean, projected on the directions of largest variance. The share of variance
    that the two drawn axes explain is given; what lies outside them is not on the map. Signs are arbitrary by nature and
    fixed here so that each direction's largest entry is positive. Layer 0 is the embedding.
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    start = encoded.start(settings.positions)
    last = loaded.anatomy.n_layers
    layers = sorted({*range(0, last + 1, settings.layer_stride), last})
    n_shown = encoded.n_tokens - start
    limit_cells(len(layers), n_shown)
    if len(layers) * n_shown > MAX_VECTORS:
        raise BadInput(
            f"{len(layers)} layers × {n_shown} positions are {len(layers) * n_shown:,} vectors, more than {MAX_VECTORS:,}; "
            f"set positions to at most {MAX_VECTORS // len(layers)}, or take a larger layer stride"
        )
    if len(layers) * n_shown < 3:
        raise BadInput("a map needs at least three vectors; give a longer prompt or show more layers")
    residual_SPD = _residuals(loaded, encoded, layers, start)
    norm_SP = residual_SPD.norm(dim=-1)
    parts = principal_components(_prepared(residual_SPD, settings))
    main = _points(encoded, start, layers, parts.scores_NK, norm_SP)
    axes = _axes(parts.share_K, main)
    return Result(
        frames={"main": main, "components": axes},
        views=_views(parts.share_K),
        metrics=(
            Metric("variance_shown", float(parts.share_K[:2].sum()), "share", n=len(main)),
            Metric("components_for_90", float(parts.n_for_90), "components", n=len(main)),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="residual_map",
            settings=settings,
            started=started,
            conditions={"tokens": encoded.n_tokens, "vectors": len(main)},
            exactness_gap=parts.gap,
            exactness_check="largest |vector − its rebuilding from all components| over the largest |vector|",
        ),
        notes=_notes(settings, encoded.n_tokens, start),
    )


class Components:
    """An exact principal component analysis. R is its rank at most."""

    def __init__(self, scores_NR: Tensor, directions_RD: Tensor, variance_R: Tensor, gap: float) -> None:
        self.scores_NK = scores_NR[:, :COMPONENTS]
        self.directions_KD = directions_RD[:COMPONENTS]
        self.share_K = variance_R[:COMPONENTS] / variance_R.sum()
        self.n_for_90 = int((variance_R.cumsum(0) / variance_R.sum() < 0.9).sum()) + 1
        self.gap = gap


def principal_components(centred_ND: Tensor) -> Components:
    """Components of float64 vectors that are already centred; raises ``BadInput`` when they are all alike.

    The sign of each direction is such that its entry of largest size is positive.
    """
    if float(centred_ND.abs().max()) <= 1e-12:
        raise BadInput(
            "all vectors are alike, so there is nothing to map; give a prompt with different tokens"
        )
    u_NR, size_R, directions_RD = torch.linalg.svd(centred_ND, full_matrices=False)
    largest_R1 = directions_RD.abs().argmax(1, keepdim=True)
    sign_R1 = directions_RD.gather(1, largest_R1).sign()
    directions_RD = directions_RD * sign_R1
    scores_NR = u_NR * size_R * sign_R1[:, 0]
    error = (scores_NR @ directions_RD - centred_ND).abs().max() / centred_ND.abs().max()
    return Components(scores_NR, directions_RD, size_R.square(), float(error))


def _residuals(loaded: LoadedModel, encoded: Encoded, layers: list[int], start: int) -> Tensor:
    """[S, P, D] in float64 on the CPU."""
    with loaded.lock, torch.inference_mode(), capture_residual(loaded) as residual:
        loaded.model(**encoded.inputs)
    streams = list(residual.values())
    residual_SPD = torch.stack([streams[layer][0, start:].double().cpu() for layer in layers])
    if not torch.isfinite(residual_SPD).all():
        raise SlimscopeError(
            "the residual stream is not finite (NaN or infinity), so it cannot be mapped; "
            "open the model in float32, or check its weights"
        )
    return residual_SPD


def _prepared(residual_SPD: Tensor, settings: ResidualMapSettings) -> Tensor:
    """Scaled and centred vectors [N, D], layers outermost."""
    if settings.scale == "unit":
        residual_SPD = residual_SPD / residual_SPD.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    dims = (0, 1) if settings.centre == "all" else (1,)
    return (residual_SPD - residual_SPD.mean(dims, keepdim=True)).flatten(0, 1)


def _points(
    encoded: Encoded, start: int, layers: list[int], scores_NK: Tensor, norm_SP: Tensor
) -> pd.DataFrame:
    """One row per vector, layers outermost."""
    n = encoded.n_tokens - start
    scores = torch.nn.functional.pad(scores_NK[:, :3], (0, max(0, 3 - scores_NK.shape[1]))).numpy()
    return pd.DataFrame(
        {
            "layer": np.repeat(layers, n),
            "position": np.tile(np.arange(start, start + n), len(layers)),
            "token": np.tile(np.array(encoded.texts[start:], dtype=object), len(layers)),
            "pc1": scores[:, 0],
            "pc2": scores[:, 1],
            "pc3": scores[:, 2],
            "norm": norm_SP.flatten().numpy(),
        }
    )


def _axes(share_K: Tensor, main: pd.DataFrame) -> pd.DataFrame:
    """Per component its share of the variance; for the mapped ones, the points at either end."""
    rows = []
    for index, share in enumerate(share_K.tolist()):
        name = f"pc{index + 1}"
        row = {"component": index + 1, "share": share, "so_far": float(share_K[: index + 1].sum())}
        for end, at in (("low_end", "idxmin"), ("high_end", "idxmax")):
            point = main.loc[getattr(main[name], at)()] if name in main else None
            row[end] = "" if point is None else f"{point['token']!r} at layer {point['layer']}"
        rows.append(row)
    return pd.DataFrame(rows)


def _views(share_K: Tensor) -> tuple[View, ...]:
    first, second = (f"{float(share):.0%}" for share in torch.nn.functional.pad(share_K, (0, 2))[:2])
    tooltip = ("token", "layer", "position", "pc3", "norm")
    drawn = f"first component ({first}) against second ({second})"
    return (
        *(
            View("scatter", x="pc1", y="pc2", color=by, title=f"By {by}: {drawn}", tooltip=tooltip)
            for by in ("layer", "position", "token")
        ),
        View(
            "bar",
            x="component",
            y="share",
            frame="components",
            title="Share of the variance that each component explains",
            unit="share",
            tooltip=("so_far", "low_end", "high_end"),
        ),
    )


def _notes(settings: ResidualMapSettings, n_tokens: int, start: int) -> tuple[str, ...]:
    notes = ["Layer 0 is the embedding; layer l is the residual stream after l blocks."]
    if start:
        notes.append(f"The last {n_tokens - start} of {n_tokens} positions are shown.")
    if settings.scale == "unit":
        notes.append("Every vector was divided by its norm: the map shows directions, the tooltip the norms.")
    return tuple(notes)
