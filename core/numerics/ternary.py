"""Ternary weights: -s, 0 or s per group of a row.

optimal: among all thresholds the one with the least squared error. Keeping the k largest magnitudes of a group, the
best s is their mean, and the error ‖W‖² - (sum of them)² / k is least at the k that maximizes the second term.
absmean: s = mean|W|, code = round(clamp(W / s, -1, 1)) (BitNet b1.58, https://arxiv.org/abs/2402.17764).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.integer import storable_dtype, stored_scale
from core.numerics.narrow import grouped
from core.numerics.packed import PackedTensor
from core.numerics.schemes import TernaryScheme

if TYPE_CHECKING:
    from torch import Tensor


def quantize(
    weight_RC: Tensor, scheme: TernaryScheme, *, scale_dtype: torch.dtype | None = None
) -> PackedTensor:
    """Round a weight of any leading shape; ``scale_dtype`` as in ``core.numerics.integer.quantize``."""
    groups = scheme.carrier.groups(weight_RC.shape[-1])
    groups_RGK = grouped(weight_RC.float(), groups)
    magnitude_RGK = groups_RGK.abs()
    if scheme.rule == "absmean":
        scale_RG = magnitude_RGK.mean(-1)
        threshold_RG = scale_RG / 2
    else:
        ordered_RGK = magnitude_RGK.sort(dim=-1, descending=True).values
        count_K = torch.arange(1, ordered_RGK.shape[-1] + 1, device=ordered_RGK.device)
        mean_RGK = ordered_RGK.double().cumsum(-1) / count_K
        best_RG1 = (mean_RGK.square() * count_K).argmax(-1, keepdim=True)
        scale_RG = mean_RGK.gather(-1, best_RG1).squeeze(-1).float()
        # At the optimum the smallest that is kept is above s / 2, the largest that is not below it.
        threshold_RG = scale_RG / 2
    scale_RG = torch.where(scale_RG == 0, torch.ones_like(scale_RG), scale_RG)
    codes_RGK = (magnitude_RGK > threshold_RG.unsqueeze(-1)).to(torch.int8) * groups_RGK.sign().to(torch.int8)
    scale_RG = stored_scale(scale_RG, scale_dtype or storable_dtype(scale_RG, bits=scheme.bits))
    return PackedTensor(codes_RGK.flatten(-2), scale_RG, None, scheme)
