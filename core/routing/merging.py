"""Which experts are merged, and into what: the mathematics, on arrays and on experts' weights.

Two published ways. *HC-SMoE* (arXiv 2410.08589): agglomerative clustering on the distance of the experts' mean outputs
over all tokens, each cluster merged by how often its experts were chosen. *REAM* (arXiv 2604.04356): the most salient
experts are centroids, and each in turn takes in the experts most like it; most groups stay single, which is why its
authors call it pseudo-pruning. Knows no model, no family and no text.

Legend: ``E`` experts, ``D`` hidden, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import CannotCompress

if TYPE_CHECKING:
    from core.routing.surgery import ExpertWeights

Floats = NDArray[np.float64]
Linkage = Literal["average", "single"]


@dataclass(frozen=True)
class Merge:
    """Experts that become one."""

    kept: int
    """The member whose place, and router row, the merged expert takes."""
    members: tuple[int, ...]
    """All of them, ``kept`` first."""
    shares: tuple[float, ...]
    """Weight of each member in the average; they sum to 1."""

    @classmethod
    def of(cls, members: Sequence[int], weight_E: Floats, *, kept: int | None = None) -> Merge:
        """Members shared by their weight, the heaviest kept if none is named; equal shares where no weight is seen."""
        if kept is None:
            kept = max(members, key=lambda expert: (weight_E[expert], -expert))
        ordered = (kept, *sorted(member for member in members if member != kept))
        weights = weight_E[list(ordered)]
        total = float(weights.sum())
        shares = weights / total if total > 0 else np.full(len(ordered), 1 / len(ordered))
        return cls(kept, ordered, tuple(shares.tolist()))


def distances(rows_ED: Floats) -> Floats:
    """Euclidean distance [E, E] of every two rows; exactly 0 on the diagonal and between equal rows."""
    gaps_EED = rows_ED[:, None] - rows_ED[None]
    found: Floats = np.sqrt((gaps_EED**2).sum(-1))
    return found


def agglomerate(distance_EE: Floats, n_clusters: int, linkage: Linkage) -> list[tuple[int, ...]]:
    """Bottom-up clustering until ``n_clusters`` are left, ordered by their first expert.

    The distance of two clusters is the mean (``average``) or the smallest (``single``) over their pairs. The tree is
    cut by the number of merges, not by height, so that ties never give fewer clusters than asked for.
    """
    from scipy.cluster.hierarchy import linkage as tree_of
    from scipy.spatial.distance import squareform

    n = len(distance_EE)
    assert 1 <= n_clusters <= n, f"{n_clusters} clusters of {n} experts"
    clusters: dict[int, tuple[int, ...]] = {expert: (expert,) for expert in range(n)}
    if n_clusters < n:
        tree = tree_of(squareform(distance_EE, checks=False), method=linkage)
        for step, (left, right) in enumerate(tree[: n - n_clusters, :2].astype(int)):
            clusters[n + step] = clusters.pop(left) + clusters.pop(right)
    return sorted(tuple(sorted(cluster)) for cluster in clusters.values())


def greedy_groups(
    similarity_EE: Floats, saliency_E: Floats, n_groups: int, largest: int
) -> list[tuple[int, ...]]:
    """The ``n_groups`` most salient experts as centroids; each group lists its centroid first.

    From the most salient on, a centroid takes in the experts most like it until its group has ``largest`` members or
    nobody is left. Raises ``CannotCompress`` where so many groups of that size do not hold all experts.
    """
    n = len(saliency_E)
    if n_groups * largest < n:
        raise CannotCompress(
            f"{n_groups} groups of at most {largest} experts cannot hold {n}; choose a larger group or keep more experts"
        )
    by_saliency = sorted(range(n), key=lambda expert: (-saliency_E[expert], expert))
    centroids, free = by_saliency[:n_groups], by_saliency[n_groups:]
    groups = []
    for centroid in centroids:
        liked = sorted(free, key=lambda expert: (-similarity_EE[centroid, expert], expert))[: largest - 1]
        free = [expert for expert in free if expert not in liked]
        groups.append((centroid, *liked))
    return groups


def mean_cosine(outputs_ETD: Any) -> Floats:
    """[E, E]: the cosine of two experts' outputs for the same token, mean over all tokens.

    Routing weights are positive factors and drop out of it. A zero output has cosine 0 with everything else.
    """
    unit_ETD = outputs_ETD / outputs_ETD.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    flat_EN = unit_ETD.flatten(1)
    found: Floats = (flat_EN @ flat_EN.T).double().cpu().numpy() / outputs_ETD.shape[1]
    return found


def column_cosine(logits_TE: Any) -> Floats:
    """[E, E]: the cosine of two experts' columns of router logits, each centred over the tokens.

    Without centring, a softmax router's common offset would make all columns alike or all opposed.
    """
    columns_TE = logits_TE.double() - logits_TE.double().mean(0)
    unit_TE = columns_TE / columns_TE.norm(dim=0).clamp(min=1e-30)
    found: Floats = (unit_TE.T @ unit_TE).cpu().numpy()
    return found


def in_router_groups(n_experts: int, n_groups: int) -> list[range]:
    """The experts of each router group: neighbours, as group-limited routers number them."""
    size = n_experts // n_groups
    return [range(first, first + size) for first in range(0, n_experts, size)]


def average(experts: Sequence[ExpertWeights], shares: Sequence[float]) -> ExpertWeights:
    """Σ share · weight, part by part, summed in float64 and put back in the first one's dtype; one expert is itself."""
    first = experts[0]
    if len(experts) == 1:
        return first
    merged = {}
    for field in fields(first):
        tensors = [getattr(expert, field.name) for expert in experts]
        if tensors[0] is None:
            continue
        total = sum(share * tensor.double() for share, tensor in zip(shares, tensors, strict=True))
        merged[field.name] = total.to(tensors[0].dtype)
    return replace(first, **merged)
