"""What a sparse autoencoder's features do over the text it was trained on: how often, how strongly, and where.

Legend: N rows (readable positions of all windows, in order), K active features of a row, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.probes._tokens import token_texts
from core.train._residuals import TextWindow

if TYPE_CHECKING:
    from torch import Tensor

SNIPPETS = 5
CANDIDATES = 20
"""Strongest places looked at per feature; snippets are the strongest of them in different windows."""
REACH = 10
"""Tokens shown on each side of the strongest one."""
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Codes:
    """Every row's active features, and where the row stands in the text."""

    values_NK: NDArray[np.float32]
    features_NK: Ints
    window_N: Ints
    position_N: Ints

    @classmethod
    def of(cls, values_NK: Tensor, features_NK: Tensor, window_N: Ints, position_N: Ints) -> Codes:
        """From an encoding."""
        return cls(values_NK.cpu().numpy(), features_NK.cpu().numpy(), window_N, position_N)

    def activation(self, rows: Ints, feature: int) -> NDArray[np.float32]:
        """What one feature is at these rows; 0 where it is not among the active ones."""
        found: NDArray[np.float32] = np.where(self.features_NK[rows] == feature, self.values_NK[rows], 0).sum(
            -1, dtype=np.float32
        )
        return found


def feature_table(codes: Codes, n_features: int) -> pd.DataFrame:
    """One row per feature: density (share of rows where it is active), mean where active, and maximum."""
    active_NK = codes.values_NK > 0
    ids, values = codes.features_NK[active_NK], codes.values_NK[active_NK]
    count_F = np.bincount(ids, minlength=n_features)
    sum_F = np.bincount(ids, weights=values, minlength=n_features)
    max_F = np.zeros(n_features, dtype=np.float32)
    np.maximum.at(max_F, ids, values)
    return pd.DataFrame(
        {
            "feature": np.arange(n_features),
            "density": count_F / len(codes.values_NK),
            "mean_activation": sum_F / np.maximum(count_F, 1),
            "max_activation": max_F,
        }
    )


def snippet_table(codes: Codes, windows: tuple[TextWindow, ...], tokenizer: Any) -> pd.DataFrame:
    """The places where each feature is strongest, one per window, with the feature's activation at each token around."""
    rows_by_place = {
        (w, p): row
        for row, (w, p) in enumerate(zip(codes.window_N.tolist(), codes.position_N.tolist(), strict=True))
    }
    texts = [token_texts(tokenizer, window.ids) for window in windows]
    records = []
    for feature, row_S in _strongest(codes):
        for rank, row in enumerate(row_S, start=1):
            w, p = int(codes.window_N[row]), int(codes.position_N[row])
            around = range(max(0, p - REACH), min(len(texts[w]), p + REACH + 1))
            rows = [rows_by_place.get((w, q)) for q in around]
            known = np.array([r for r in rows if r is not None], dtype=np.int64)
            values = iter(codes.activation(known, feature).tolist())
            records.append(
                {
                    "feature": feature,
                    "rank": rank,
                    "document": windows[w].document,
                    "activation": float(codes.activation(np.array([row]), feature)[0]),
                    "peak": p - around.start,
                    "tokens": [texts[w][q] for q in around],
                    "activations": [0.0 if r is None else next(values) for r in rows],
                }
            )
    columns = ("feature", "rank", "document", "activation", "peak", "tokens", "activations")
    return pd.DataFrame.from_records(records, columns=columns)


def _strongest(codes: Codes) -> list[tuple[int, list[int]]]:
    """Per active feature, rows where it is strongest, each in another window."""
    row_M, slot_M = np.nonzero(codes.values_NK > 0)
    ids_M, values_M = codes.features_NK[row_M, slot_M], codes.values_NK[row_M, slot_M]
    order = np.lexsort((-values_M, ids_M))
    found = []
    for group in np.split(order, np.flatnonzero(np.diff(ids_M[order])) + 1):
        if not len(group):
            continue
        rows: dict[int, int] = {}
        for row in row_M[group[:CANDIDATES]].tolist():
            rows.setdefault(int(codes.window_N[row]), row)
        found.append((int(ids_M[group[0]]), list(rows.values())[:SNIPPETS]))
    return found


def marked(tokens: Sequence[str], peak: int) -> str:
    """A snippet as one line, its strongest token in ⟦ ⟧."""
    return "".join([*tokens[:peak], f"⟦{tokens[peak]}⟧", *tokens[peak + 1 :]])
