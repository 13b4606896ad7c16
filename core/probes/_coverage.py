"""How often a text reaches each expert, and how much more of it each needs to be judged by what it showed.

Counts in, tables out; reads no model. Legend: D texts (domains), L MoE layers, E experts.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.probes._routing_report import layer_by_expert

Ints = NDArray[np.int64]
RULE_OF_THREE = 3.0
"""An expert that none of T tokens reached gets, with 95 % confidence, at most 3 / T of them (Hanley 1983)."""


def coverage(
    load_DLE: Ints, tokens_D: Ints, names: list[str], layers: tuple[int, ...], wanted: int
) -> pd.DataFrame:
    """One row per layer and expert: tokens, how many more are needed, of which text best, and a verdict."""
    load_LE, total = load_DLE.sum(0), int(tokens_D.sum())
    best_LE = (load_DLE / tokens_D[:, None, None]).argmax(0)
    load_of_best_LE = np.take_along_axis(load_DLE, best_LE[None], 0)[0]
    return pd.DataFrame(
        {
            **layer_by_expert(layers, load_LE.shape[1]),
            "tokens": load_LE.ravel(),
            "share": load_LE.ravel() / total,
            "needs_more": needed(load_LE, load_LE, total, wanted).ravel(),
            "best_text": np.where(load_LE > 0, np.array(names, dtype=object)[best_LE], "").ravel(),
            "needs_of_best_text": needed(load_LE, load_of_best_LE, tokens_D[best_LE], wanted).ravel(),
            "verdict": np.select(
                [load_LE == 0, load_LE < wanted], ["never reached", "too few"], "covered"
            ).ravel(),
        }
    )


def needed(load: Ints, reached: Ints, tokens: Ints | int, wanted: int) -> Ints:
    """More tokens until ``load`` is ``wanted``, of a text that gave ``reached`` in ``tokens``; at least, where it gave 0."""
    rate = np.maximum(reached, RULE_OF_THREE * (reached == 0)) / tokens
    more: Ints = np.ceil(np.maximum(0, wanted - load) / rate).astype(np.int64)
    return more
