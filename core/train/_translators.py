"""Translators of a tuned lens: per layer an affine map that brings its residual stream into the last layer's basis.

Legend: L translated layers (0 the embedding … n_layers − 1), S shown layers, N positions, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.train._trained import Learned


@dataclass(frozen=True)
class Translators:
    """h ↦ h + h · Δ_l + b_l, that is A_l = 1 + Δ_lᵀ. All zero: the logit lens, bit for bit."""

    delta_LDD: Tensor
    bias_LD: Tensor

    @classmethod
    def identity(cls, loaded: LoadedModel) -> Translators:
        """The logit lens."""
        layers, d, device = loaded.anatomy.n_layers, loaded.anatomy.d_model, loaded.device
        return cls(torch.zeros(layers, d, d, device=device), torch.zeros(layers, d, device=device))

    @classmethod
    def of(cls, learned: Learned) -> Translators:
        """From a stored artifact."""
        return cls(learned.tensors["delta"], learned.tensors["bias"])

    def translate(self, layer: int, residual_ND: Tensor) -> Tensor:
        """Residuals of one layer [N, D], in the dtype they came in; those of the last layer come back as they are."""
        if layer == len(self.delta_LDD):
            return residual_ND
        wide_ND = residual_ND.to(torch.promote_types(residual_ND.dtype, torch.float32))
        moved_ND = wide_ND @ self.delta_LDD[layer].to(wide_ND.dtype) + self.bias_LD[layer].to(wide_ND.dtype)
        return (wide_ND + moved_ND).to(residual_ND.dtype)

    def translate_all(self, residual_SND: Tensor, layers: Sequence[int]) -> Tensor:
        """Residuals of several layers [S, N, D]."""
        rows = zip(layers, residual_SND, strict=True)
        return torch.stack([self.translate(layer, row_ND) for layer, row_ND in rows])
