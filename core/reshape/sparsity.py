"""Which weights of a matrix become zero, and what the others must become: plain functions of weights and inputs.

Legend: ``O`` outputs, ``I`` inputs of a matrix; ``k`` columns of one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from core.lazy import torch
from core.quantize.columns import inverse_factor

if TYPE_CHECKING:
    from torch import Tensor

Pattern = Literal["unstructured", "2:4", "4:8"]
BLOCK = 128
"""Columns that SparseGPT masks together before any of them is made good."""


@dataclass(frozen=True)
class Sparsity:
    """How many zeros, and where they may be."""

    share: float
    """Of all weights; for N:M patterns the pattern says it."""
    group: tuple[int, int] | None = None
    """(N, M): N of every M neighbouring inputs of an output are zero; None: anywhere."""

    @classmethod
    def of(cls, pattern: Pattern, share: float) -> Sparsity:
        """From a method's settings."""
        if pattern == "unstructured":
            return cls(share)
        zeros, every = map(int, pattern.split(":"))
        return cls(zeros / every, (zeros, every))


def row_mask(scores_OI: Tensor, sparsity: Sparsity) -> Tensor:
    """True where a weight goes: the lowest scores of each row, or of each N:M group; of equals the first.

    Exactly ⌊share · I⌋ per row, or N of every M. I must be a multiple of M.
    """
    if sparsity.group is None:
        return _lowest(scores_OI, _count(sparsity.share, scores_OI.shape[1]))
    zeros, every = sparsity.group
    groups = scores_OI.reshape(-1, every)
    return _lowest(groups, zeros).view(scores_OI.shape)


def _lowest(scores: Tensor, n: int) -> Tensor:
    """True at the ``n`` lowest of each row."""
    order = scores.argsort(dim=1, stable=True)[:, :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def _count(share: float, n: int) -> int:
    """⌊share · n⌋, where share · n may have been rounded below a whole number."""
    return int(share * n + 1e-9)


def threshold_masks(weights: Iterable[Tensor], share: float) -> Iterator[Tensor]:
    """True where a weight goes when the smallest magnitudes of all these tensors together go; of equals the first.

    Exactly ⌊share · n⌋ of n values. The threshold is found by bisection on the bits of float32, which sort as their
    magnitudes do: no copy of all values is made, whatever the model's size; ``weights`` is gone through many times.
    """
    wanted = _count(share, sum(weight.numel() for weight in weights))
    low, high = -1, 0x7F800000  # below zero, and infinity
    while high - low > 1:  # fewer than wanted are ≤ low, at least wanted are ≤ high
        middle = (low + high) // 2
        enough = sum(int((_bits(weight) <= middle).sum()) for weight in weights) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    left = wanted - sum(int((_bits(weight) < high).sum()) for weight in weights)
    for weight in weights:
        bits = _bits(weight)
        mask = bits < high
        equal = (bits == high).flatten().nonzero()[:left, 0] if wanted else bits.new_zeros(0)
        mask.view(-1)[equal] = True
        left -= len(equal)
        yield mask


def _bits(weight: Tensor) -> Tensor:
    """Float32 magnitudes as integers of the same order."""
    return weight.float().abs().contiguous().view(torch.int32)


def wanda_scores(weight_OI: Tensor, sum_squares_I: Tensor) -> Tensor:
    """|W_ij| · ‖X_j‖₂ (Wanda, 2306.11695)."""
    return weight_OI.abs() * sum_squares_I.sqrt()


def sparsegpt(
    weight_OI: Tensor, gram_II: Tensor, sparsity: Sparsity, *, damping: float
) -> tuple[Tensor, float]:
    """W with zeros where they cost least, the other weights making them good (SparseGPT, 2301.00774); and the damping used.

    The damping is NaN where XᵀX cannot be inverted at any: then the smallest weights go and nothing makes them good.
    In each block of 128 columns go the lowest W² / U_ii² of the block over all rows, or of each N:M group when its turn
    comes; then column by column, from the left, what a zero takes from the output is put on the columns to the right.
    """
    factors_1II, used_1 = inverse_factor(gram_II[None], damping=damping)
    upper_II = factors_1II[0]
    # Transposed, so that one column of W is one run of memory.
    weight_IO = weight_OI.T.contiguous()
    weight_IO[gram_II.diagonal() == 0] = 0
    for start in range(0, len(weight_IO), BLOCK):
        stop = min(start + BLOCK, len(weight_IO))
        errors_kO = _one_block(weight_IO[start:stop], upper_II[start:stop, start:stop], sparsity)
        weight_IO[stop:].addmm_(upper_II[start:stop, stop:].T, errors_kO, alpha=-1)
    return weight_IO.T.contiguous(), float(used_1[0])


def _one_block(block_kO: Tensor, upper_kk: Tensor, sparsity: Sparsity) -> Tensor:
    """Prune one block in place; what each column's zeros leave for the columns behind the block, [k, O]."""
    scale_k1 = upper_kk.diagonal()[:, None]
    gone_kO = torch.zeros_like(block_kO, dtype=torch.bool)
    if sparsity.group is None:
        flat = (block_kO / scale_k1).square().T.reshape(1, -1)
        gone_kO = _lowest(flat, _count(sparsity.share, flat.numel())).view(block_kO.T.shape).T
    errors_kO = torch.zeros_like(block_kO)
    for column in range(len(block_kO)):
        if sparsity.group is not None and column % sparsity.group[1] == 0:
            zeros, every = sparsity.group
            rows = slice(column, column + every)
            scores = (block_kO[rows] / scale_k1[rows]).square().T.contiguous()
            gone_kO[rows] = _lowest(scores, zeros).T
        errors_kO[column] = block_kO[column] / scale_k1[column] * gone_kO[column]
        block_kO[column:].addr_(upper_kk[column, column:], errors_kO[column], alpha=-1)
        block_kO[column].masked_fill_(gone_kO[column], 0.0)
    return errors_kO


def output_error(before_OI: Tensor, after_OI: Tensor, gram_II: Tensor) -> float:
    """‖X(W' − W)ᵀ‖ / ‖XWᵀ‖ over the calibration tokens."""
    change_OI = after_OI - before_OI
    lost = (change_OI @ gram_II * change_OI).sum()
    whole = (before_OI @ gram_II * before_OI).sum()
    return float((lost.clamp_min(0) / whole).sqrt()) if whole > 0 else 0.0
