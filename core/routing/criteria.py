"""Which experts matter: one score per expert and layer by each criterion, higher is worth keeping.

All but AIMER are sums over the tokens of a calibration text, with X_j the tokens routed to expert j, g_j(x) the routing
weight as applied and f_j(x) the expert's output before weighting. Scores of different criteria, and of different
layers, cannot be compared. The exhaustive search is in ``exhaustive.py``: it scores sets, not experts.

Legend: ``L`` MoE layers, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput
from core.lazy import torch
from core.routing.surgery import read_expert

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.routing.aggregate import Aggregates
    from core.routing.discover import MoeLayer

Floats = NDArray[np.float64]
Criterion = Literal["reap", "man", "msan", "ean", "frequency", "aimer", "naee", "random"]


@dataclass(frozen=True)
class About:
    """What a criterion is."""

    title: str
    formula: str
    paper: str
    reads_text: bool = True


CRITERIA: dict[Criterion, About] = {
    "reap": About("REAP", "mean over X_j of g_j · ‖f_j‖", "https://arxiv.org/abs/2510.13999"),
    "man": About("MAN", "mean over X_j of ‖f_j‖", "https://arxiv.org/abs/2606.15716"),
    "msan": About("MSAN", "mean over X_j of ‖f_j‖²", "https://arxiv.org/abs/2606.15716"),
    "ean": About("EAN", "sum over X_j of ‖f_j‖", "https://arxiv.org/abs/2510.13999"),
    "frequency": About("Frequency", "|X_j|", "https://arxiv.org/abs/2402.14800"),
    "aimer": About("AIMER", "−mean|W_j| / RMS(W_j)", "https://arxiv.org/abs/2603.18492", reads_text=False),
    "naee": About(
        "NAEE, exhaustive", "argmin over kept sets of ‖F(x) − F_kept(x)‖", "https://arxiv.org/abs/2402.14800"
    ),
    "random": About("Random", "drawn from a seed: the control", "", reads_text=False),
}


def scores_LE(
    criterion: Criterion,
    loaded: LoadedModel,
    layers: Sequence[MoeLayer],
    counts: Aggregates | None,
    *,
    seed: int = 0,
) -> Floats:
    """Every expert's score, [L, E] float64; ``counts`` with norms for criteria that read text.

    An expert that no calibration token reached has score 0 by those: its mean is over nothing.
    """
    if criterion == "aimer":
        return np.array([[-aimer(loaded, at.layer, e) for e in range(at.n_experts)] for at in layers])
    if criterion == "random":
        return np.random.default_rng(seed).random((len(layers), layers[0].n_experts))
    assert counts is not None, f"{criterion} is computed from counts"
    return _FROM_COUNTS[criterion](counts)


def aimer(loaded: LoadedModel, layer: int, expert: int) -> float:
    """mean|W| / RMS(W) over all matrices of an expert: 1 where all weights are ±c, √(2/π) for Gaussian ones."""
    weights = read_expert(loaded, layer, expert)
    parts = [part for part in (weights.gate_ID, weights.up_ID, weights.down_DI) if part is not None]
    flat = torch.cat([part.flatten().double() for part in parts])
    return float(flat.abs().mean() / flat.square().mean().sqrt())


def never_reached(layers: Sequence[MoeLayer], counts: Aggregates) -> dict[int, tuple[int, ...]]:
    """Layer → experts that no token of the text was routed to; layers without such experts are left out."""
    found = {
        at.layer: tuple(np.flatnonzero(row == 0).tolist())
        for at, row in zip(layers, counts.load_LE, strict=True)
    }
    return {layer: experts for layer, experts in found.items() if experts}


def best_experts(
    layer: MoeLayer, scores_E: Floats, n_kept: int, protected: Collection[int] = ()
) -> list[int]:
    """The ``n_kept`` experts with the highest scores, protected ones first, as many in every router group; sorted.

    Of equal scores the earlier expert stays. Raises ``BadInput`` where more experts are protected than may stay.
    """
    size, each = layer.n_experts // layer.n_groups, n_kept // layer.n_groups
    kept: list[int] = []
    for first in range(0, layer.n_experts, size):
        group = range(first, first + size)
        guarded = sum(e in protected for e in group)
        if guarded > each:
            of_group = f" of group {first // size}" if layer.n_groups > 1 else ""
            raise BadInput(
                f"layer {layer.layer} protects {guarded} experts{of_group} but would keep {each}; remove fewer or "
                "shorten the protect list"
            )
        kept += sorted(group, key=lambda e: (e not in protected, -scores_E[e], e))[:each]
    return sorted(kept)


def _mean(sums_LE: Floats | None, counts: Aggregates) -> Floats:
    assert sums_LE is not None, "counts were taken without norms"
    means: Floats = sums_LE / np.maximum(counts.load_LE, 1)
    return means


def _ean(counts: Aggregates) -> Floats:
    assert counts.norm_sum_LE is not None, "counts were taken without norms"
    return counts.norm_sum_LE


_FROM_COUNTS: Mapping[str, Callable[[Aggregates], Floats]] = {
    "reap": lambda counts: _mean(counts.gated_norm_sum_LE, counts),
    "man": lambda counts: _mean(counts.norm_sum_LE, counts),
    "msan": lambda counts: _mean(counts.norm_sq_sum_LE, counts),
    "ean": _ean,
    "frequency": lambda counts: counts.load_LE.astype(np.float64),
}
