"""From one gated MLP to several experts and back: the arithmetic, on plain tensors.

Nothing here knows a model, a family or a text. An expert is a gated MLP, f(x) = W_down (act(W_gate x) ⊙ W_up x);
a neuron is one row of W_gate and W_up with the same column of W_down, and an MLP is the sum of its neurons. Hence
neurons may be dealt out to experts, and experts laid side by side in one MLP, without changing the sum.

Legend: ``E`` experts, ``D`` hidden, ``I`` neurons, ``T`` tokens, ``F`` features of a neuron, ``M`` experts laid side
by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

ROUNDS = 30
"""Of k-means at most; it mostly settles within ten."""


class GatedMlp(NamedTuple):
    """The three matrices as ``nn.Linear`` stores them, [out, in]."""

    gate_ID: Tensor
    up_ID: Tensor
    down_DI: Tensor

    @property
    def width(self) -> int:
        """Number of neurons."""
        return self.gate_ID.shape[0]


def fused(experts: Sequence[GatedMlp]) -> tuple[Tensor, Tensor]:
    """``gate_up_proj`` [E, 2 I, D] and ``down_proj`` [E, D, I], as transformers holds the experts of one layer."""
    gate_up = torch.stack([torch.cat([expert.gate_ID, expert.up_ID]) for expert in experts])
    return gate_up, torch.stack([expert.down_DI for expert in experts])


def redrawn(mlp: GatedMlp, share: float, generator: Generator) -> GatedMlp:
    """A copy with round(share · I) neurons drawn anew, the same ones in all three matrices (arXiv 2502.19261).

    New weights are normal, with mean and standard deviation of the weights they replace, one pair per matrix.
    """
    n = round(share * mlp.width)
    if n == 0:
        return GatedMlp(*(weight.clone() for weight in mlp))
    chosen = torch.randperm(mlp.width, generator=generator)[:n]

    def fresh(rows: Tensor) -> Tensor:
        wide = rows.float()
        noise = torch.randn(rows.shape, generator=generator).to(rows.device)
        return (wide.mean() + wide.std() * noise).to(rows.dtype)

    gate, up, down = (weight.clone() for weight in mlp)
    gate[chosen], up[chosen] = fresh(gate[chosen]), fresh(up[chosen])
    down[:, chosen] = fresh(down[:, chosen])
    return GatedMlp(gate, up, down)


def dealt(mlp: GatedMlp, cluster_I: Tensor, n_experts: int, *, scale: float) -> list[GatedMlp]:
    """The MLP's neurons dealt out to experts by their cluster; Σ_e f_e = scale · f."""
    parts = [(cluster_I == expert).nonzero()[:, 0] for expert in range(n_experts)]
    return [GatedMlp(mlp.gate_ID[part], mlp.up_ID[part], mlp.down_DI[:, part] * scale) for part in parts]


def laid_side_by_side(experts: Sequence[GatedMlp], gates_M: Tensor) -> GatedMlp:
    """One MLP of all the experts' neurons, f = Σ_m gates_m · f_m: a gate that is constant is a factor on W_down."""
    down = [
        (expert.down_DI.double() * gate).to(expert.down_DI.dtype)
        for expert, gate in zip(experts, gates_M.double(), strict=True)
    ]
    return GatedMlp(
        torch.cat([expert.gate_ID for expert in experts]),
        torch.cat([expert.up_ID for expert in experts]),
        torch.cat(down, dim=1),
    )


def padded(mlp: GatedMlp, width: int) -> GatedMlp:
    """The MLP with neurons of zero weights up to ``width``; they add exactly nothing."""
    missing = width - mlp.width
    rows = mlp.gate_ID.new_zeros(missing, mlp.gate_ID.shape[1])
    return GatedMlp(
        torch.cat([mlp.gate_ID, rows]), torch.cat([mlp.up_ID, rows]), torch.cat([mlp.down_DI, rows.T], dim=1)
    )


def balanced_clusters(features_IF: Tensor, n_clusters: int, *, seed: int) -> Tensor:
    """Cluster of each neuron [I], all of I / n_clusters neurons: k-means whose clusters have that much room.

    Neurons choose in the order of what they would lose by their second choice, which is a good and fast answer to the
    assignment problem, not the optimal one (MoEfication, arXiv 2110.01786, solves it likewise approximately). Best of
    all rounds by the sum of squared distances. ``n_clusters`` divides I.
    """
    n, room = len(features_IF), len(features_IF) // n_clusters
    assert room * n_clusters == n, f"{n} neurons do not divide into {n_clusters} clusters"
    points = torch.nn.functional.normalize(features_IF.float(), dim=-1)
    centres = _spread_centres(points, n_clusters, torch.Generator().manual_seed(seed))
    best, lowest = torch.arange(n) // room, float("inf")
    for _ in range(ROUNDS):
        distance = torch.cdist(points, centres).square()
        cluster = _choose(distance, room)
        cost = float(distance.cpu()[torch.arange(n), cluster].sum())
        if cost >= lowest:
            break
        best, lowest = cluster, cost
        centres = torch.stack([points[(cluster == c).to(points.device)].mean(0) for c in range(n_clusters)])
    return best


def _spread_centres(points: Tensor, n: int, generator: Generator) -> Tensor:
    """First centres: a random point, then each time one drawn by its squared distance to the nearest (k-means++)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(n - 1):
        nearest = torch.cdist(points, points[chosen]).square().amin(-1).cpu()
        weights = nearest if bool(nearest.sum() > 0) else torch.ones(len(points))
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]


def _choose(distance: Tensor, room: int) -> Tensor:
    """Each row's column, no column more than ``room`` times; rows with most to lose choose first."""
    nearest = distance.topk(min(2, distance.shape[1]), largest=False).values
    order = (nearest[:, -1] - nearest[:, 0]).argsort(descending=True, stable=True).tolist()
    preferences = distance.argsort(dim=1, stable=True).tolist()
    left = [room] * distance.shape[1]
    cluster = [0] * len(order)
    for row in order:
        column = next(c for c in preferences[row] if left[c])
        left[column] -= 1
        cluster[row] = column
    return torch.tensor(cluster)


def linear_router(gram_DD: Tensor, moment_DE: Tensor, n_tokens: int, *, spread: float) -> Tensor:
    """Router rows [E, D] whose logits predict, over experts, which score is larger: ridge regression without bias.

    ``gram_DD`` is XᵀX of what the MLP reads, ``moment_DE`` is XᵀS of the scores less their mean over experts. Scaled
    so that logits have the standard deviation ``spread`` around a token's mean: only their order is meant to count.
    """
    gram = gram_DD.double()
    ridge = 1e-3 * gram.diagonal().mean()
    rows_ED = torch.linalg.solve(
        gram + ridge * torch.eye(len(gram), device=gram.device), moment_DE.double()
    ).T
    rows_ED = rows_ED - rows_ED.mean(0)
    power = ((rows_ED @ gram) * rows_ED).sum() / (n_tokens * len(rows_ED))
    scaled_ED: Tensor = rows_ED * (spread / power.sqrt().clamp_min(1e-300))
    return scaled_ED


def constant_gates(gram_MM: Tensor, moment_M: Tensor) -> Tensor:
    """The constants c that minimise E‖y − Σ_m c_m f_m‖²: gram_mn = E⟨f_m, f_n⟩, moment_m = E⟨f_m, y⟩.

    Least norm where experts are copies of one another. Returns the true gates where they are constant.
    """
    gates_M: Tensor = torch.linalg.pinv(gram_MM.double(), hermitian=True) @ moment_M.double()
    return gates_M
