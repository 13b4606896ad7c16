"""Routing drift as tables: by layer, by token, by margin, by move; and the loss split in two.

Legend: L MoE layers, T tokens, E experts, S pieces, N predicted tokens, G documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.probes._clustered import ratio_half
from core.probes._rerouted import Pieces
from core.probes._routing_drift import Drift, Floats, Ints
from core.probes._tokens import MAX_CELLS
from core.routing.statistics import overlap_by_chance
from core.text.token_texts import token_texts

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

MAX_EDGES = 400
BINS = 10
"""Bins of equally many (layer, token) margins."""


@dataclass(frozen=True)
class Whole:
    """All pieces side by side."""

    pieces: Pieces
    drifts: list[Drift]
    layers: tuple[int, ...]
    overlap_LT: Floats
    weight_drift_LT: Floats
    margin_LT: Floats
    document_T: Ints

    @classmethod
    def of(cls, pieces: Pieces, drifts: list[Drift]) -> Whole:
        lengths = [len(ids) for ids in pieces.ids]
        return cls(
            pieces,
            drifts,
            drifts[0].original.layers,
            np.concatenate([drift.overlap_LT for drift in drifts], axis=1),
            np.concatenate([drift.weight_drift_LT for drift in drifts], axis=1),
            np.concatenate([drift.original.margin_LT for drift in drifts], axis=1).astype(np.float64),
            np.repeat(pieces.document_S, lengths),
        )

    def sums(self, part: str) -> Floats:
        """Each document's sum of one kind of surprisal added."""
        return self.pieces.per_document([getattr(drift, part).sum() for drift in self.drifts])


def layer_rows(whole: Whole) -> pd.DataFrame:
    """One row per layer; intervals over documents."""
    n_documents = whole.pieces.n_documents
    counted_G = np.bincount(whole.document_T, minlength=n_documents).astype(np.float64)
    sums_GL = np.stack(
        [
            np.bincount(whole.document_T, weights=row, minlength=n_documents)
            for row in np.nan_to_num(whole.overlap_LT, nan=1.0)
        ],
        axis=1,
    )
    overlap_L = sums_GL.sum(0) / counted_G.sum()
    half_L = ratio_half(sums_GL, counted_G[:, None])
    trace = whole.drifts[0].original
    return pd.DataFrame(
        {
            "layer": whole.layers,
            "overlap": overlap_L,
            "low": np.clip(overlap_L - half_L, 0, 1),
            "high": np.clip(overlap_L + half_L, 0, 1),
            "flipped_share": (whole.overlap_LT < 1).mean(1),
            "weight_drift": np.nanmean(whole.weight_drift_LT, axis=1),
            "by_chance": overlap_by_chance(trace.n_experts, trace.top_k)[0],
        }
    )


def split(whole: Whole) -> pd.DataFrame:
    """The loss added, and its two parts."""
    bootstrap, predicted_G = whole.pieces.bootstrap(), whole.pieces.predicted_G
    rows = []
    for part, attribute in (
        ("all", "delta"),
        ("weight error", "weight_error"),
        ("routing error", "routing_error"),
    ):
        interval = bootstrap.ratio(whole.sums(attribute), predicted_G)
        rows.append(
            {
                "part": part,
                "nats": float(whole.sums(attribute).sum() / whole.pieces.n_predicted),
                "low": interval.low,
                "high": interval.high,
            }
        )
    return pd.DataFrame(rows).astype({"low": "float64", "high": "float64"})


def token_rows(loaded: LoadedModel, drifts: list[Drift], harm: float) -> pd.DataFrame:
    """One row per token; the last of a piece predicts nothing."""
    return pd.concat(
        [_piece_tokens(loaded, number, drift, harm) for number, drift in enumerate(drifts)], ignore_index=True
    )


def _piece_tokens(loaded: LoadedModel, number: int, drift: Drift, harm: float) -> pd.DataFrame:
    flips_T = (drift.overlap_LT < 1).sum(0)
    columns: dict[str, Any] = {
        "piece": number,
        "position": np.arange(len(drift.texts)),
        "token": drift.texts,
        "target": [*drift.texts[1:], ""],
        "drift": 1 - np.nanmean(drift.overlap_LT, axis=0),
        "flipped_layers": flips_T,
    }
    for name, values_N in (
        ("delta_nats", drift.delta),
        ("weight_nats", drift.weight_error),
        ("routing_nats", drift.routing_error),
    ):
        columns[name] = np.append(values_N, np.nan)
    tops = np.concatenate([drift.top_original, drift.top_variant])
    named = token_texts(loaded.tokenizer, tops.tolist())
    columns["top1_original"] = [*named[: len(tops) // 2], ""]
    columns["top1_variant"] = [*named[len(tops) // 2 :], ""]
    routing_T = columns["routing_nats"]
    verdict_T = np.select([routing_T > harm, routing_T < -harm], ["harmful", "helpful"], "harmless")
    columns["verdict"] = np.where(flips_T == 0, "no flip", verdict_T)
    columns["verdict"][-1] = ""
    return pd.DataFrame(columns)


def cells(drift: Drift) -> pd.DataFrame:
    """Layer × position of the first piece: overlap, and both choices, heaviest first."""
    n_layers, n_tokens = drift.overlap_LT.shape
    n = min(n_tokens, MAX_CELLS // n_layers)
    original = drift.original
    return pd.DataFrame(
        {
            "layer": np.repeat(original.layers, n),
            "position": np.tile(np.arange(n), n_layers),
            "token": np.tile(np.array(drift.texts[:n], dtype=object), n_layers),
            "overlap": drift.overlap_LT[:, :n].ravel(),
            "weight_drift": drift.weight_drift_LT[:, :n].ravel(),
            "margin": original.margin_LT[:, :n].ravel().astype(np.float64),
            "experts_original": _listed(original.experts_LTK[:, :n], original.weights_LTK[:, :n]),
            "experts_variant": _listed(drift.experts_LTK[:, :n], drift.weights_LTK[:, :n]),
        }
    )


def _listed(experts_LTK: NDArray[np.int16], weights_LTK: NDArray[np.float32]) -> list[str]:
    order = np.argsort(-weights_LTK, axis=-1, kind="stable")
    ranked_LTK = np.take_along_axis(experts_LTK, order, -1)
    return [", ".join(str(e) for e in row if e >= 0) for layer in ranked_LTK for row in layer.tolist()]


def margins(whole: Whole) -> pd.DataFrame:
    """Share of choices that flipped, by the original's margin; empty where its routers' margins are unknown."""
    margin_N, flipped_N = whole.margin_LT.ravel(), (whole.overlap_LT < 1).ravel()
    known_N = np.isfinite(margin_N)
    margin_N, flipped_N = margin_N[known_N], flipped_N[known_N]
    bins = np.array_split(np.argsort(margin_N, kind="stable"), BINS) if len(margin_N) >= BINS else []
    rows = [
        {
            "margin": float(np.median(margin_N[at])),
            "margin_up_to": float(margin_N[at].max()),
            "flipped_share": float(flipped_N[at].mean()),
            "share_of_flips": float(flipped_N[at].sum() / max(1, flipped_N.sum())),
            "choices": len(at),
        }
        for at in bins
    ]
    return pd.DataFrame(
        rows, columns=["margin", "margin_up_to", "flipped_share", "share_of_flips", "choices"]
    )


def moved(drifts: list[Drift], layer: int) -> pd.DataFrame:
    """The most used moves of one layer: from, to, tokens (fractions where several experts changed)."""
    moved_EE = np.sum([drift.moved_LEE()[layer] for drift in drifts], axis=0)
    source_N, target_N = np.nonzero(moved_EE)
    frame = pd.DataFrame(
        {
            "source": [f"E{e}" for e in source_N],
            "target": ["nobody" if e == moved_EE.shape[0] else f"E{e}" for e in target_N],
            "moved": moved_EE[source_N, target_N],
        }
    ).astype({"source": "object", "target": "object", "moved": "float64"})
    return frame.sort_values("moved", ascending=False, kind="stable", ignore_index=True).head(MAX_EDGES)


def verdicts(tokens: pd.DataFrame) -> pd.DataFrame:
    """How many predicted tokens the flips harmed, and how much loss that makes."""
    predicted = tokens[tokens["verdict"] != ""]
    names = ["no flip", "harmless", "harmful", "helpful"]
    grouped = predicted.groupby("verdict")["routing_nats"]
    counts, sums = (
        column.reindex(names, fill_value=0).to_numpy() for column in (grouped.count(), grouped.sum())
    )
    return pd.DataFrame(
        {
            "verdict": names,
            "share_of_tokens": counts / len(predicted),
            "tokens": counts,
            "routing_nats": sums / len(predicted),
        }
    )
