"""Scores of attention patterns: where each head looks, reduced to a few numbers per head.

Legend: H heads (of any number of sequences with the same repeats), Q query positions, K key positions, P positions.

After the head detectors of Olsson et al. 2022, and Kobayashi et al. 2020 for weighting by what a head moves. Patterns
come in one layer at a time and leave as numbers; it knows no model and no prompt text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.errors import BadInput
from core.lazy import torch
from core.models.weights import split_heads, to_query_heads
from core.probes._head_weights import dense_weight

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Block
    from core.models.loaded import LoadedModel

PAIR_SCORES = ("induction_score", "duplicate_token_score")
"""Scores that exist only where tokens repeat."""


class PatternScorer:
    """Reduces one layer's patterns to scores per head; remembers how far rows are from summing to 1."""

    def __init__(self, ids: Sequence[int], *, causal: bool, device: str) -> None:
        self.causal = causal
        self.gap = 0.0
        ids_P = torch.tensor(ids, device=device)
        self._n = len(ids_P)
        same_QK = (ids_P[:, None] == ids_P[None, :]).tril(-1)
        # The key after an earlier copy; the query itself is no successor worth a score (it is the self share).
        after_QK = torch.zeros_like(same_QK)
        after_QK[:, 1:] = same_QK[:, :-1]
        after_QK &= torch.ones_like(after_QK).tril(-1)
        self._pairs = dict(zip(PAIR_SCORES, (after_QK, same_QK), strict=True))
        self.repeats = bool(after_QK.any())

    def score(
        self, pattern_HQK: Tensor, *, window: int | None, norms_HK: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Score → a value per head [H]; ``norms_HK`` is the length of what each head moves from each position."""
        self.gap = max(self.gap, float((pattern_HQK.sum(-1) - 1).abs().max()))
        if self.causal:
            self.gap = max(self.gap, float(pattern_HQK.triu(1).max()))
        entropy_HQ = torch.special.entr(pattern_HQK).sum(-1)
        most_Q = self._visible_keys(window).to(entropy_HQ).log()
        several_Q = most_Q > 0
        first_HQ = pattern_HQK[:, :, 0]
        scores = {
            "entropy_nats": entropy_HQ.mean(-1),
            "entropy_share": (entropy_HQ / most_Q)[:, several_Q].mean(-1),
            "previous_token_share": pattern_HQK.diagonal(-1, 1, 2).mean(-1),
            "first_token_share": first_HQ[:, 1:].mean(-1),
            "self_share": pattern_HQK.diagonal(0, 1, 2).mean(-1),
            **{name: _mean_weight(pattern_HQK, mask_QK) for name, mask_QK in self._pairs.items()},
        }
        if norms_HK is not None:
            moved_HQ = (pattern_HQK @ norms_HK[..., None])[..., 0]
            share_HQ = first_HQ * norms_HK[:, :1] / moved_HQ.clamp_min(torch.finfo(moved_HQ.dtype).tiny)
            scores["first_token_weighted_share"] = share_HQ[:, 1:].mean(-1)
        return scores

    def _visible_keys(self, window: int | None) -> Tensor:
        """How many keys each query may look at."""
        if not self.causal:
            return torch.full((self._n,), self._n)
        return torch.arange(1, self._n + 1).clamp(max=window or self._n)


def _mean_weight(pattern_HQK: Tensor, mask_QK: Tensor) -> Tensor:
    """Weight on the masked keys, averaged over queries that have one; NaN where none has."""
    n_rows = mask_QK.any(-1).sum()
    return pattern_HQK.flatten(1) @ mask_QK.flatten().to(pattern_HQK) / n_rows


def value_norms(loaded: LoadedModel, block: Block, v_BPX: Tensor) -> Tensor:
    """‖v_p · W_O^h‖, [B, H, P]: how long the vector is that head h adds to the stream per unit of attention on p.

    ``v_BPX`` is what the module at ``block.v`` put out. Kobayashi et al. 2020.
    """
    anatomy = loaded.anatomy
    v_BHPK = to_query_heads(anatomy, split_heads(anatomy, v_BPX, "v")).movedim(-2, -3)
    o_ID = dense_weight(loaded.model.get_submodule(block.o))
    o_HKD = o_ID.view(anatomy.n_heads, anatomy.head_dim, anatomy.d_model)
    # ‖v W‖² = v (W Wᵀ) vᵀ: head_dim² numbers per head instead of d_model per position.
    v_BHPK = v_BHPK.to(o_HKD.dtype)
    squared_BHP: Tensor = torch.linalg.vecdot(v_BHPK @ (o_HKD @ o_HKD.mT), v_BHPK)
    return squared_BHP.clamp(min=0).sqrt() * anatomy.residual_scale


def check_head(loaded: LoadedModel, layer: int, head: int) -> None:
    """Raise ``BadInput`` when the model has no such head."""
    anatomy = loaded.anatomy
    for name, value, n in (("layer", layer, anatomy.n_layers), ("head", head, anatomy.n_heads)):
        if value >= n:
            raise BadInput(f"{name} {value} does not exist: {loaded.ref} has {n}, from 0 to {n - 1}")
