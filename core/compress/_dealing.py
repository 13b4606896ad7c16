"""Which neurons of a dense model belong together, and which of the resulting experts a token needs: from running text.

The dense model runs as it is; every layer is looked at on its own, on the input it really had. What is learned on
some windows is measured on others. Legend: ``T`` tokens of a window, ``D`` hidden, ``I`` neurons, ``E`` experts,
``N`` neurons of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.capture import capture
from core.lazy import torch
from core.models.anatomy import Block
from core.models.loaded import LoadedModel
from core.routing._upcycling import balanced_clusters, linear_router
from core.train._residuals import TextWindow, run_window
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    See = Callable[[Block, Tensor, Tensor], None]

SAMPLED = 512
"""Tokens whose activations tell neurons apart; more cost memory (neurons · tokens · 4 bytes a layer)."""
CHOOSERS = ("router", "true norms", "chance")


def by_gate_rows(loaded: LoadedModel, n_experts: int, *, seed: int) -> dict[int, Tensor]:
    """Cluster of each neuron [I] per block: neurons with gate rows of similar direction go together."""
    return {
        block.index: balanced_clusters(loaded.model.get_submodule(block.gate).weight, n_experts, seed=seed)
        for block in loaded.anatomy.blocks
    }


def by_activation(
    loaded: LoadedModel, windows: Sequence[TextWindow], n_experts: int, *, seed: int, progress: Progress
) -> dict[int, Tensor]:
    """Cluster of each neuron [I] per block: neurons that are active on the same tokens go together."""
    seen: dict[int, list[Tensor]] = {block.index: [] for block in loaded.anatomy.blocks}
    each = max(1, -(-SAMPLED // len(windows)))

    def sample(block: Block, read_TD: Tensor, active_TI: Tensor) -> None:
        step = max(1, len(active_TI) // each)
        strength = active_TI[::step][:each].abs().float()
        seen[block.index].append(strength / strength.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    _every_mlp(loaded, windows[:SAMPLED], sample, progress, "watching neurons")
    return {
        index: balanced_clusters(torch.cat(samples).T, n_experts, seed=seed)
        for index, samples in seen.items()
    }


def fit_routers(
    loaded: LoadedModel, windows: Sequence[TextWindow], clusters: Mapping[int, Tensor], n_experts: int, *,
    spread: float, progress: Progress,
) -> dict[int, Tensor]:  # fmt: skip
    """Router rows [E, D] per block that predict each expert's share of the sum of all experts' output norms."""
    d_model = loaded.anatomy.d_model
    gram = {i: torch.zeros(d_model, d_model, device=loaded.device) for i in clusters}
    moment = {i: torch.zeros(d_model, n_experts, device=loaded.device) for i in clusters}

    def learn(block: Block, read_TD: Tensor, active_TI: Tensor) -> None:
        norm_TE = _parts(loaded, block, clusters[block.index], n_experts, active_TI).norm(dim=-1)
        share_TE = norm_TE / norm_TE.sum(-1, keepdim=True).clamp_min(1e-12)
        gram[block.index] += read_TD.T @ read_TD
        moment[block.index] += read_TD.T @ (share_TE - share_TE.mean(-1, keepdim=True))

    _every_mlp(loaded, windows, learn, progress, "fitting routers")
    n_tokens = sum(len(window.ids) for window in windows)
    return {i: linear_router(gram[i], moment[i], n_tokens, spread=spread) for i in clusters}


def measure(
    loaded: LoadedModel, windows: Sequence[TextWindow], clusters: Mapping[int, Tensor], routers: Mapping[int, Tensor],
    *, top_k: int, seed: int, progress: Progress,
) -> pd.DataFrame:  # fmt: skip
    """What is missing of each layer's output when only ``top_k`` experts run: layer, chosen_by, relative_error, recall.

    ``relative_error`` is √(Σ‖missing‖² / Σ‖output‖²) over all tokens; ``recall`` the share of the experts with the
    largest outputs that were chosen. Chosen by the fitted router, by the true norms (which no router can know), and
    by chance.
    """
    sums: dict[tuple[int, str], list[float]] = {(i, by): [0.0, 0.0, 0.0] for i in clusters for by in CHOOSERS}
    generator = torch.Generator().manual_seed(seed)

    def weigh(block: Block, read_TD: Tensor, active_TI: Tensor) -> None:
        router_ED = routers[block.index].to(read_TD.dtype)
        parts_TED = _parts(loaded, block, clusters[block.index], len(router_ED), active_TI)
        norm_TE = parts_TED.norm(dim=-1)
        scores = {
            "router": read_TD @ router_ED.T,
            "true norms": norm_TE,
            "chance": torch.rand(norm_TE.shape, generator=generator).to(norm_TE.device),
        }
        best_TE = _chosen(norm_TE, top_k)
        whole = float(parts_TED.sum(1).square().sum())
        for by, score_TE in scores.items():
            chosen_TE = _chosen(score_TE, top_k)
            missing = float((parts_TED * ~chosen_TE[..., None]).sum(1).square().sum())
            found = float((chosen_TE & best_TE).sum()) / top_k
            for at, value in enumerate((missing, whole, found)):
                sums[block.index, by][at] += value

    _every_mlp(loaded, windows, weigh, progress, "measuring routers")
    n_tokens = sum(len(window.ids) for window in windows)
    rows = [
        {"layer": i, "chosen_by": by, "relative_error": (missing / whole) ** 0.5, "recall": found / n_tokens}
        for (i, by), (missing, whole, found) in sums.items()
    ]
    return pd.DataFrame(rows)


def _every_mlp(
    loaded: LoadedModel, windows: Sequence[TextWindow], see: See, progress: Progress, doing: str
) -> None:
    """Run the windows and show ``see`` what each block's MLP read [T, D] and its neurons' activations [T, I]."""
    blocks = {str(path): block for block in loaded.anatomy.blocks for path in (block.up, block.down)}
    read: dict[int, Tensor] = {}

    def collect(path: str, tensor: Tensor) -> None:
        block = blocks[path]
        if path == block.up:
            read[block.index] = tensor[0].float()
        else:
            see(block, read.pop(block.index), tensor[0].float())

    for done, window in enumerate(windows):
        progress(done, len(windows), doing)
        with capture(loaded.model, list(blocks), inputs=True, reduce=collect):
            run_window(loaded, window)


def _parts(loaded: LoadedModel, block: Block, cluster_I: Tensor, n_experts: int, active_TI: Tensor) -> Tensor:
    """What each expert's neurons write, [T, E, D]; their sum is the MLP's output."""
    order = cluster_I.argsort(stable=True).to(active_TI.device)
    down_DI: Any = loaded.model.get_submodule(str(block.down)).weight.float()
    down_EDN = down_DI[:, order].view(len(down_DI), n_experts, -1).transpose(0, 1)
    active_ETN = active_TI[:, order].view(len(active_TI), n_experts, -1).transpose(0, 1)
    return torch.bmm(active_ETN, down_EDN.transpose(1, 2)).transpose(0, 1)


def _chosen(score_TE: Tensor, top_k: int) -> Tensor:
    return torch.zeros_like(score_TE, dtype=torch.bool).scatter_(
        -1, score_TE.topk(top_k, -1).indices, value=True
    )
