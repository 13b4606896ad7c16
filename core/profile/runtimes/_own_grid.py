"""A stored integer weight as a graph runtime can keep it: codes, scales and zero points, and which weight they are.

Graphs are traced from dense weights, so a graph's constant is found again by its content: the SHA-256 of its bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from core.models.loaded import LoadedModel
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme
from core.saving.reread import reread


@dataclass(frozen=True, eq=False)
class OwnGrid:
    """``weight = (codes − zero) × scale``, in groups of a row. Legend: R rows, G groups, K columns of a group."""

    codes_RGK: np.ndarray
    """int8, on the signed range of ``bits``."""
    scale_RG: np.ndarray
    """float32."""
    zero_RG: np.ndarray | None
    """int8, on the same range; None for a symmetric grid."""
    bits: int
    exact: bool
    """Whether products in float32 give the loaded weight bit for bit; else it was multiplied in a narrower dtype."""


def key_of(array: np.ndarray) -> str:
    """What a dense weight is known by."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def own_grids(loaded: LoadedModel) -> dict[str, OwnGrid]:
    """Key → grid of every dense integer weight that the model's folder stores; others are left to the graph."""
    found: dict[str, OwnGrid] = {}
    for module, packed in reread(loaded).items():
        if not isinstance(packed, PackedTensor) or not isinstance(packed.scheme, IntegerScheme):
            continue
        if packed.scale is None or packed.codes.ndim != 2:
            continue
        weight = loaded.model.get_submodule(module).weight.detach().float().numpy()
        grid = _grid(packed, weight)
        found[key_of(weight)] = grid
    return found


def dense(grid: OwnGrid) -> np.ndarray:
    """The weight [R, C] that the grid says, float32."""
    codes = grid.codes_RGK.astype(np.float32)
    if grid.zero_RG is not None:
        codes -= grid.zero_RG[..., None].astype(np.float32)
    weight_RC: np.ndarray = (codes * grid.scale_RG[..., None]).reshape(codes.shape[0], -1)
    return weight_RC


def _grid(packed: PackedTensor, weight_RC: np.ndarray) -> OwnGrid:
    assert packed.scale is not None
    assert isinstance(packed.scheme, IntegerScheme)
    rows = packed.codes.shape[0]
    scale_RG = np.broadcast_to(packed.scale.float().numpy(), (rows, packed.scale.shape[-1])).copy()
    codes_RGK = packed.codes.numpy().reshape(rows, scale_RG.shape[1], -1)
    zero_RG = None if packed.zero_point is None else packed.zero_point.numpy()
    if zero_RG is not None:
        zero_RG = np.broadcast_to(zero_RG, scale_RG.shape).copy()
    grid = OwnGrid(codes_RGK, scale_RG, zero_RG, packed.scheme.bits, exact=True)
    same = np.array_equal(dense(grid), weight_RC)
    return grid if same else OwnGrid(codes_RGK, scale_RG, zero_RG, packed.scheme.bits, exact=False)
