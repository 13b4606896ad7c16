"""Scores of every head on repeated random tokens, sequence by sequence, and how well the model predicts them.

Legend: S sequences, B sequences at once, P positions, R rows, L layers, H heads, D d_model.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.capture import capture
from core.lazy import torch
from core.models.anatomy_verify import eager_attention
from core.probes._batching import in_batches
from core.probes._distribution import batch_reader, describe, rows_at_once
from core.probes._head_scores import PatternScorer
from core.probes._head_weights import at_least_float32
from core.probes._repeats import Repeats
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]
FROM_PATTERNS: dict[str, str] = {
    "induction": "induction_score",
    "previous_token": "previous_token_share",
    "duplicate_token": "duplicate_token_score",
    "entropy_nats": "entropy_nats",
    "bos_share": "first_token_share",
}
"""Column here → score of ``_head_scores.py``."""


def bytes_each(anatomy: Anatomy, positions: int) -> int:
    """Peak of one sequence: three copies of a layer's patterns, and its widest activations."""
    patterns = 3 * anatomy.n_heads * positions**2
    return 4 * (patterns + positions * (4 * anatomy.d_ff + 8 * anatomy.d_model))


@dataclass(frozen=True)
class Measured:
    """Scores of all sequences, and how well the model predicts either half."""

    scores: dict[str, Floats]
    """Column → [S, L, H]."""
    nats_SP: Floats
    """Surprisal of each token but the first."""
    gap: float
    """Largest |row sum − 1| of any pattern, or weight on a later token."""


def measure(loaded: LoadedModel, repeats: Repeats, progress: Progress) -> Measured:
    """Forward passes over all sequences, as many at once as fit; patterns are reduced inside the hook."""
    anatomy = loaded.anatomy
    scorer = PatternScorer(repeats.structure, causal=True, device=loaded.device)
    n, positions = repeats.ids_SP.shape
    layer_of = {block.attention: block.index for block in anatomy.blocks}

    def run(first: int, stop: int) -> tuple[dict[str, Floats], Floats]:
        progress(first, n, f"sequence {first + 1} of {n}")
        found: defaultdict[str, list[Floats]] = defaultdict(list)

        def reduce(path: str, pattern_BHPP: Tensor) -> None:
            scores = scorer.score(
                at_least_float32(pattern_BHPP.flatten(0, 1)), window=anatomy.windows[layer_of[path]]
            )
            for column, name in FROM_PATTERNS.items():
                found[column].append(scores[name].view(stop - first, -1).double().cpu().numpy())

        ids_BP = repeats.ids_SP[first:stop]
        last = anatomy.blocks[-1].path
        with (
            capture(loaded.model, list(layer_of), reduce=reduce, item=1),
            capture(loaded.model, [last]) as residual,
        ):
            loaded.model(ids_BP, use_cache=False, logits_to_keep=1)
        return {name: np.stack(parts, 1) for name, parts in found.items()}, _nats(
            loaded, residual[last], ids_BP
        )

    with eager_attention(loaded.model):
        parts = in_batches(n, run, bytes_each=bytes_each(anatomy, positions), device=loaded.device)
    scores = {name: np.concatenate([part[0][name] for part in parts]) for name in FROM_PATTERNS}
    return Measured(scores, np.concatenate([part[1] for part in parts]), scorer.gap)


def _nats(loaded: LoadedModel, residual_BPD: Tensor, ids_BP: Tensor) -> Floats:
    """Surprisal of every token but the first [B, P − 1]; logits exist for a few rows at a time."""
    read = batch_reader(loaded)
    rows_RD = residual_BPD[:, :-1].flatten(0, 1)
    targets_R = ids_BP[:, 1:].flatten()
    step = rows_at_once(loaded.anatomy.vocab_size)
    log_p = [
        describe(
            read(rows_RD[first : first + step]),
            targets_R[first : first + step],
            top_k=1,
            where=lambda row: "a random sequence",
        ).log_p_target_R
        for first in range(0, len(rows_RD), step)
    ]
    values: Floats = -torch.cat(log_p).view(len(ids_BP), -1).double().cpu().numpy()
    return values
