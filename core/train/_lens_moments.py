"""The least-squares start of a tuned lens: every layer's residuals mapped to the last one's, in closed form.

Legend: L translated layers, P positions, D d_model, E d_model + 1 (the constant).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch
from core.train._translators import Translators

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-3
"""Of the mean variance: pulls a translator towards the identity in directions the text does not span."""


class Moments:
    """Sums for the least-squares map from (h_l, 1) to h_last − h_l, rows weighted by 1 / |h_last|²."""

    def __init__(self, n_layers: int, d_model: int, device: str) -> None:
        wide = d_model + 1
        self.xx_LEE = torch.zeros(n_layers, wide, wide, dtype=torch.float64, device=device)
        self.xy_LED = torch.zeros(n_layers, wide, d_model, dtype=torch.float64, device=device)

    def add(self, residual_LPD: Tensor) -> None:
        """Take one window in. The norm before the unembedding undoes a row's size, so big rows must not rule."""
        rows_LPD = residual_LPD / residual_LPD[-1].norm(dim=-1, keepdim=True).clamp(min=1e-6)
        ones_P = 1 / residual_LPD[-1].norm(dim=-1, keepdim=True).clamp(min=1e-6)
        for layer, row_PD in enumerate(rows_LPD[:-1]):
            x_PE = torch.cat([row_PD, ones_P], -1)
            self.xx_LEE[layer] += (x_PE.T @ x_PE).double()
            self.xy_LED[layer] += (x_PE.T @ (rows_LPD[-1] - row_PD)).double()

    def solve(self, scale_LD: Tensor) -> Translators:
        """Ridge regression in coordinates of unit size; Δ = 0 where nothing was seen."""
        one_L1 = torch.ones_like(scale_LD[:, :1])
        scale_LE = torch.cat([scale_LD, one_L1], -1).double()
        xx_LEE = self.xx_LEE / scale_LE[:, :, None] / scale_LE[:, None, :]
        size_L = xx_LEE.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye_EE = torch.eye(scale_LE.shape[-1], dtype=torch.float64, device=scale_LE.device)
        ridge_LEE = xx_LEE + RIDGE * size_L[:, None, None] * eye_EE
        # Symmetric and positive definite by the ridge. A batched LU of these sizes sometimes fails inside MKL.
        root_LEE = torch.linalg.cholesky(ridge_LEE)
        found_LED = torch.cholesky_solve(self.xy_LED / scale_LE[:, :, None], root_LEE) / scale_LE[:, :, None]
        return Translators(found_LED[:, :-1].float(), found_LED[:, -1].float())
