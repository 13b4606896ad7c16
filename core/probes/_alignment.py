"""How alike two representations of the same tokens are: debiased linear CKA, group of documents by group.

Legend: G groups, N tokens of a group, S and T representations on either side, D width.

Linear CKA is HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)) with K = XXᵀ (Kornblith et al. 2019): 1 under any rotation and
scaling of either side, whatever the widths. The plain HSIC of N tokens is biased upward, the more the wider X is, so
that independent vectors look alike; here it is the unbiased one (Song et al. 2012), whose mean over groups is that of
all tokens (Nguyen et al. 2021). Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.evaluate._intervals import MIN_DOCUMENTS
from core.lazy import torch
from core.probes._clustered import jackknife_half

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Sums = tuple[Floats, Floats, Floats]
"""Of one group: cross [S, T], own [S], own [T]."""
GROUP = 4
"""Documents compared together: more would cost the square of their tokens and hardly tighten the interval."""
GRAM_NUMBERS = 1 << 26
"""Numbers that the Gram matrices of one group may hold (float32: 256 MB); more tokens are thinned evenly."""


def thinned(n_tokens: int, n_grams: int) -> list[int]:
    """Which of a group's tokens are compared: all, or as many as memory allows, evenly spaced."""
    most = int((GRAM_NUMBERS / n_grams) ** 0.5)
    return (
        list(range(n_tokens)) if n_tokens <= most else np.linspace(0, n_tokens - 1, most).astype(int).tolist()
    )


def gram(x_XND: Tensor, metric_XDD: Tensor | None = None) -> Tensor:
    """X · metric · Xᵀ of centred rows, with a zero diagonal: no token is compared with itself. No metric is X · Xᵀ."""
    x_XND = x_XND - x_XND.mean(-2, keepdim=True)
    k_XNN: Tensor = (x_XND if metric_XDD is None else x_XND @ metric_XDD) @ x_XND.mT
    k_XNN.diagonal(dim1=-2, dim2=-1).zero_()
    return k_XNN


def hsic(k_SNN: Tensor, l_TNN: Tensor) -> Floats:
    """Unbiased HSIC [S, T] of every pair of Gram matrices with zero diagonals; needs four tokens at least.

    (⟨K, L⟩ + 1ᵀK1 · 1ᵀL1 / ((n − 1)(n − 2)) − 2 · 1ᵀKL1 / (n − 2)) / (n (n − 3))
    """
    n = k_SNN.shape[-1]
    assert n >= 4, f"{n} tokens"
    k_SN, l_TN = k_SNN.double().sum(-1), l_TNN.double().sum(-1)
    inner_ST = (k_SNN.flatten(1) @ l_TNN.flatten(1).mT).double()
    sums_ST = k_SN.sum(-1)[:, None] * l_TN.sum(-1)[None]
    found_ST = inner_ST + sums_ST / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k_SN @ l_TN.mT)
    values: Floats = (found_ST / (n * (n - 3))).cpu().numpy()
    return values


def own_hsic(k_SNN: Tensor) -> Floats:
    """HSIC [S] of each Gram matrix with itself."""
    return np.array([hsic(k_NN[None], k_NN[None])[0, 0] for k_NN in k_SNN])


@dataclass(frozen=True)
class Alignment:
    """Similarity of every pair as a ratio of sums over groups: cross / √(own · own)."""

    cross_GST: Floats
    own_GS: Floats
    own_GT: Floats

    @classmethod
    def of(cls, parts: Sequence[Sums]) -> Alignment:
        """From every group's sums."""
        cross, left, right = zip(*parts, strict=True)
        return cls(np.stack(cross), np.stack(left), np.stack(right))

    @property
    def value_ST(self) -> Floats:
        """The similarity over all groups; NaN where one side is constant."""
        found: Floats = self._ratio(self._flat().sum(0)[None])[0]
        return found

    @property
    def half_ST(self) -> Floats:
        """Half of its 95 % interval: jackknife over groups; NaN with too few."""
        if len(self.own_GS) < MIN_DOCUMENTS:
            return np.full(self.cross_GST.shape[1:], np.nan)
        return jackknife_half(self._flat(), self._ratio)

    def half_of_gain(self, best_S: NDArray[np.int64], other_S: NDArray[np.int64]) -> Floats:
        """Half of the interval of similarity[s, best] − similarity[s, other], both on the same groups."""
        if len(self.own_GS) < MIN_DOCUMENTS:
            return np.full(len(best_S), np.nan)
        rows = np.arange(len(best_S))

        def gain(counts_BX: NDArray[np.float64]) -> Floats:
            ratio_BST = self._ratio(counts_BX)
            found: Floats = ratio_BST[:, rows, best_S] - ratio_BST[:, rows, other_S]
            return found

        return jackknife_half(self._flat(), gain)

    def _flat(self) -> Floats:
        n = len(self.own_GS)
        return np.concatenate([self.cross_GST.reshape(n, -1), self.own_GS, self.own_GT], axis=1)

    def _ratio(self, counts_BX: NDArray[np.float64]) -> Floats:
        n_left, n_right = self.own_GS.shape[1], self.own_GT.shape[1]
        cross_BST = counts_BX[:, : n_left * n_right].reshape(-1, n_left, n_right)
        left_BS = counts_BX[:, n_left * n_right : n_left * n_right + n_left]
        right_BT = counts_BX[:, n_left * n_right + n_left :]
        scale_BST = left_BS[:, :, None] * right_BT[:, None, :]
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Floats = np.where(scale_BST > 0, cross_BST / np.sqrt(scale_BST), np.nan)
        return found


def turned(x_ND: Tensor) -> Tensor:
    """The same vectors rotated (axes permuted, every second one mirrored) and tripled: alike in every respect here."""
    signs_D = torch.where(torch.arange(x_ND.shape[1], device=x_ND.device) % 2 == 0, 1.0, -1.0)
    return 3 * (x_ND * signs_D.to(x_ND.dtype)).flip(1)
