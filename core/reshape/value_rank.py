"""The product of a head's output and value matrices at a lower rank: plain functions of two matrices.

A head writes O · V · c for every mixed latent c it is given: two matrices in a row, with nothing between them, so that
any invertible matrix may stand between them, and a product of lower rank is the same pair with fewer rows and columns.

Legend: ``O`` outputs, ``v`` value dimensions of a head, ``R`` latent dimensions, ``k`` value dimensions that stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-6
"""Directions of XᵀX with less than this share of its largest eigenvalue are taken to be that large: they can be divided by."""


def truncated(
    output_Ov: Tensor, value_vR: Tensor, gram_vv: Tensor | None, rank: int
) -> tuple[Tensor, Tensor, float]:
    """O' and V' of rank ``rank`` (zeros behind it, so shapes stay), and ‖O'V' − OV‖ / ‖OV‖ in the norm that was minimised.

    With ``gram_vv`` = Σ z zᵀ of the values z = V c, that norm is of the outputs: Σ ‖O z − O' V' c‖². Without, of the
    matrix itself. By Eckart and Young no other pair of that rank is closer.
    """
    half_vv, back_vv = _root(gram_vv) if gram_vv is not None else _root(value_vR @ value_vR.T)
    left_Ov, small_vv = torch.linalg.qr(output_Ov)
    rotation_vv, sizes_v, mixed_vv = torch.linalg.svd(small_vv @ half_vv)
    keep = torch.arange(len(sizes_v), device=sizes_v.device) < rank
    new_output_Ov = left_Ov @ rotation_vv * sizes_v * keep
    new_value_vR = keep[:, None] * (mixed_vv @ back_vv @ value_vR)
    lost = sizes_v[rank:].square().sum() / sizes_v.square().sum().clamp_min(torch.finfo(sizes_v.dtype).tiny)
    return new_output_Ov, new_value_vR, float(lost.sqrt())


def _root(gram_vv: Tensor) -> tuple[Tensor, Tensor]:
    """G^½ and G^-½."""
    sizes_v, turn_vv = torch.linalg.eigh(gram_vv)
    root_v = sizes_v.clamp_min(FLOOR * sizes_v[-1].clamp_min(torch.finfo(sizes_v.dtype).tiny)).sqrt()
    return turn_vv * root_v @ turn_vv.T, turn_vv / root_v @ turn_vv.T
