"""How far a variant's residual stream is from its original's, and which part of that each block added itself.

Legend: L layers, S = L + 1 points of the residual stream, N shown positions, P prompt positions, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from core.capture import capture, capture_residual
from core.intervene import intervene
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.probes._tokens import Encoded


@dataclass(frozen=True)
class Errors:
    """Norms of the errors as shares of the original's residual norm, [S, N]; layer 0 has only its own."""

    drift_SN: np.ndarray
    own_SN: np.ndarray
    inherited_SN: np.ndarray
    gap: float

    @classmethod
    def of(cls, original_SND: Tensor, variant_SND: Tensor, on_original_LND: Tensor) -> Errors:
        """From both residual streams, and what the variant's blocks make of the original's."""
        total_SND = (variant_SND - original_SND).float()
        own_LND = (on_original_LND - original_SND[1:]).float()
        inherited_LND = (variant_SND[1:] - on_original_LND).float()
        rebuilt_LND = own_LND + inherited_LND
        largest_L = original_SND[1:].float().abs().amax(dim=(1, 2))
        gap = ((rebuilt_LND - total_SND[1:]).abs().amax(dim=(1, 2)) / largest_L).max()
        norm_SN = original_SND.float().norm(dim=-1)
        nothing_1N = torch.zeros_like(norm_SN[:1])
        own_SN = torch.cat([total_SND[:1].norm(dim=-1), own_LND.norm(dim=-1)])
        inherited_SN = torch.cat([nothing_1N, inherited_LND.norm(dim=-1)])
        drift_SN, own_SN, inherited_SN = (x / norm_SN for x in (total_SND.norm(dim=-1), own_SN, inherited_SN))
        return cls(drift_SN.cpu().numpy(), own_SN.cpu().numpy(), inherited_SN.cpu().numpy(), float(gap))


def residuals(loaded: LoadedModel, encoded: Encoded, start: int) -> Tensor:
    """The residual stream at every point from position ``start`` on, [S, ·, D]."""
    with capture_residual(loaded, reduce=lambda path, h_BPD: h_BPD[0, start:].clone()) as residual:
        loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=1)
    return torch.stack(list(residual.values()))


def blocks_on(loaded: LoadedModel, encoded: Encoded, original_SPD: Tensor, start: int) -> Tensor:
    """Every block's output on the original's input, [L, N, D], in one forward pass: each input is replaced."""
    paths = [block.path for block in loaded.anatomy.blocks]
    input_of = dict(zip(paths, original_SPD, strict=False))

    def put(path: str, h_BPD: Tensor) -> Tensor:
        original_PD: Tensor = input_of[path]
        return original_PD[None].to(h_BPD)

    with (
        intervene(loaded.model, paths, put, inputs=True),
        capture(loaded.model, paths, reduce=lambda path, h_BPD: h_BPD[0, start:].clone()) as out,
    ):
        loaded.model(**encoded.inputs, use_cache=False, logits_to_keep=1)
    return torch.stack([out[path] for path in paths]).to(original_SPD)
