"""Super-experts: the few whose outputs hold the massive activations that attention sinks need.

Removing them breaks a model out of all proportion to how often they are chosen (arXiv 2507.23279: 3 of 6,144 experts
of Qwen3-30B-A3B). They show by the largest single value they ever put out.

Legend: ``L`` MoE layers, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.lazy import torch
from core.routing.lens import Routed, routed

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.routing.discover import MoeLayer

QUANTILE = 0.995
SHARE_OF_LARGEST = 0.1
DEPTH = 0.75
"""Only in this first part of the blocks: massive activations are made early, the last layers take them back."""
TIMES_MEDIAN = 10
"""Beyond the paper: below 200 experts the largest one is above the quantile by definition, outlier or not."""


def output_peaks(
    loaded: LoadedModel, layers: Sequence[MoeLayer], texts: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """[L, E]: the largest |component| of each expert's output over the texts' tokens; hold ``loaded.lock``."""
    row = {at.layer: index for index, at in enumerate(layers)}
    peaks_LE = torch.zeros(len(layers), layers[0].n_experts + 1, device=loaded.device)

    def keep(at: Routed) -> None:
        assert at.outputs_TKD is not None, "the lens was asked for outputs"
        peaks_TK = at.outputs_TKD.abs().amax(-1).float()
        # Column E takes the slots that reach no expert.
        experts = at.experts_TK.where(at.experts_TK >= 0, layers[0].n_experts)
        peaks_LE[row[at.layer]].scatter_reduce_(0, experts.flatten(), peaks_TK.flatten(), "amax")

    for ids in texts:
        with torch.inference_mode(), routed(loaded, keep, outputs=True):
            loaded.model(input_ids=torch.tensor([list(ids)], device=loaded.device), use_cache=False)
    found: NDArray[np.float64] = peaks_LE[:, :-1].double().cpu().numpy()
    return found


def super_experts(
    peaks_LE: NDArray[np.float64], layers: Sequence[MoeLayer], n_blocks: int
) -> dict[int, tuple[int, ...]]:
    """Layer → its super-experts: peak above the 99.5 % quantile, a tenth of the largest, and ten medians, early on."""
    early = np.array([at.layer < DEPTH * n_blocks for at in layers])
    least = max(
        float(np.quantile(peaks_LE, QUANTILE)),
        SHARE_OF_LARGEST * float(peaks_LE.max()),
        TIMES_MEDIAN * float(np.median(peaks_LE)),
    )
    found = {
        at.layer: tuple(np.flatnonzero(peaks_LE[i] > least).tolist())
        for i, at in enumerate(layers)
        if early[i]
    }
    return {layer: experts for layer, experts in found.items() if experts}
