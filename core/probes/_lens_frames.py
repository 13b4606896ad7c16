"""A lens as tables: one row per cell, the top tokens of each cell, and where each position's prediction settles.

Legend: S shown points, N shown positions, K top tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from core.probes._tokens import token_texts
from core.types import Metric, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.probes._lens_grid import Grid, Lens


def lens_frames(loaded: LoadedModel, lens: Lens) -> dict[str, pd.DataFrame]:
    """The cells (first, ``main``), the top tokens, and one row per position."""
    cells = _cells(loaded, lens)
    return {"main": cells, "topk": _top_tokens(loaded, lens), "tokens": _token_strip(cells, lens)}


def lens_metrics(lens: Lens) -> tuple[Metric, ...]:
    """When predictions settle, and how sure the last layer is."""
    settled = settling_layers(lens.grid.top_ids_SNK[:, :, 0], lens.layers)
    return (
        Metric("settling_layer", float(settled.mean()), "layers", n=len(settled)),
        Metric("final_entropy", float(lens.grid.entropy_SN[-1].mean()), "nats", n=len(settled)),
    )


_TOOLTIP = (
    "token",
    "target",
    "top1",
    "p_top1",
    "entropy_nats",
    "kl_to_final_nats",
    "rank_of_target",
    "rank_movement",
    "p_target",
)
LENS_VIEWS = (
    View(
        "heatmap",
        x="position",
        y="layer",
        color="entropy_nats",
        text="top1",
        title="Entropy of each layer's prediction",
        unit="nats",
        tooltip=_TOOLTIP,
    ),
    View(
        "heatmap",
        x="position",
        y="layer",
        color="kl_to_final_nats",
        text="top1",
        title="Distance to the final prediction (KL)",
        unit="nats",
        tooltip=_TOOLTIP,
    ),
    View(
        "heatmap",
        x="position",
        y="layer",
        color="rank_of_target",
        text="top1",
        title="Rank of the target",
        log=True,
        tooltip=_TOOLTIP,
    ),
    View(
        "heatmap",
        x="position",
        y="layer",
        color="rank_halvings",
        text="movement",
        title="How far the target's rank moved since the row before",
        unit="halvings of the rank",
        midpoint=0,
        tooltip=_TOOLTIP,
    ),
    View(
        "tokens",
        x="position",
        color="settling_layer",
        text="token",
        frame="tokens",
        title="Layer from which the prediction stays",
        unit="layer",
        tooltip=("target", "final_top1", "final_entropy_nats"),
    ),
    View(
        "table",
        x="position",
        y="layer",
        color="probability",
        text="token",
        frame="topk",
        title="Top tokens of one cell",
        tooltip=("rank", "token_id"),
    ),
)


def _cells(loaded: LoadedModel, lens: Lens) -> pd.DataFrame:
    """One row per shown point and position, points outermost."""
    grid, encoded, start = lens.grid, lens.encoded, lens.start
    n_shown, n = grid.entropy_SN.shape
    targets = lens.target_texts
    has_target = np.tile(np.array([bool(lens.target) or p < n - 1 for p in range(n)]), n_shown)
    rank = np.where(has_target, grid.rank_SN.ravel(), np.nan)
    moved, halvings = _movement(rank.reshape(n_shown, n))
    return pd.DataFrame(
        {
            "layer": np.repeat(lens.layers, n),
            "point": np.repeat(np.array([point.name for point in lens.points], dtype=object), n),
            "position": np.tile(np.arange(start, start + n), n_shown),
            "token": np.tile(np.array(encoded.texts[start:], dtype=object), n_shown),
            "target": np.tile(np.array(targets, dtype=object), n_shown),
            "top1": token_texts(loaded.tokenizer, grid.top_ids_SNK[:, :, 0].ravel().tolist()),
            "p_top1": grid.top_p_SNK[:, :, 0].ravel(),
            "entropy_nats": grid.entropy_SN.ravel(),
            "kl_to_final_nats": grid.kl_SN.ravel(),
            "rank_of_target": rank,
            "rank_movement": moved.ravel(),
            "rank_halvings": halvings.ravel(),
            "movement": [_arrow(places) for places in moved.ravel().tolist()],
            "p_target": np.where(has_target, grid.p_target_SN.ravel(), np.nan),
        }
    )


def _movement(rank_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places the target rose since the row before (negative: fell), and log₂ of the ratio; NaN in the first row."""
    before_SN = np.vstack([np.full_like(rank_SN[:1], np.nan), rank_SN[:-1]])
    return before_SN - rank_SN, np.log2(before_SN / rank_SN)


def _arrow(places: float) -> str:
    """``↑3``, ``↓40``, ``=``; empty where nothing is known."""
    if math.isnan(places):
        return ""
    return "=" if places == 0 else f"{'↑' if places > 0 else '↓'}{abs(int(places))}"


def _top_tokens(loaded: LoadedModel, lens: Lens) -> pd.DataFrame:
    """One row per shown point, position and rank; narrow numbers: the largest frame to cross the pipe."""
    grid: Grid = lens.grid
    n_shown, n, k = grid.top_ids_SNK.shape
    ids = grid.top_ids_SNK.ravel()
    position = np.repeat(np.arange(lens.start, lens.start + n, dtype=np.int32), k)
    return pd.DataFrame(
        {
            "layer": np.repeat(lens.layers, n * k),
            "position": np.tile(position, n_shown),
            "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), n_shown * n),
            "token_id": ids.astype(np.int32),
            "token": token_texts(loaded.tokenizer, ids.tolist()),
            "probability": grid.top_p_SNK.ravel(),
        }
    )


def _token_strip(cells: pd.DataFrame, lens: Lens) -> pd.DataFrame:
    """One row per position: where its prediction settled, and what the model finally says."""
    final = cells[cells["layer"] == lens.layers[-1]]
    return pd.DataFrame(
        {
            "position": final["position"].to_numpy(),
            "token": final["token"].to_numpy(),
            "target": final["target"].to_numpy(),
            "settling_layer": settling_layers(lens.grid.top_ids_SNK[:, :, 0], lens.layers),
            "final_top1": final["top1"].to_numpy(),
            "final_entropy_nats": final["entropy_nats"].to_numpy(),
        }
    )


def settling_layers(top1_SN: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """Per position the first shown layer from which the top token never changes again."""
    differs_SN = top1_SN != top1_SN[-1]
    n_until_settled_N = len(layers) - np.argmax(differs_SN[::-1], axis=0)
    settled: np.ndarray = np.where(differs_SN.any(axis=0), layers[n_until_settled_N % len(layers)], layers[0])
    return settled


def lens_notes(lens: Lens) -> list[str]:
    """What a reader must know of any lens."""
    n_tokens = lens.encoded.n_tokens
    notes = ["Layer 0 is the embedding; layer l is the residual stream after l blocks."]
    if any(not point.whole for point in lens.points):
        notes.append("Layer l − ½ is after the attention of block l and before its MLP.")
    if lens.start:
        notes.append(f"The last {n_tokens - lens.start} of {n_tokens} positions are shown.")
    return notes
