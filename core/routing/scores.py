"""What a router's logits say beside its decision: how undecided it was, and how close the next expert came.

Only for the rules in ``rules.py``; for an unknown rule the answer is NaN, never a guess.

Legend: ``T`` rows, ``E`` experts, ``K`` slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.routing.rules import Rule

CHOSEN_BY_LOGIT = ("softmax_topk", "softmax_topk_renorm", "topk_softmax", "topk_sigmoid")
"""Rules whose chosen experts are those with the largest logits; the others add a bias or choose groups first."""


def distribution(rule: Rule, logits_TE: Tensor) -> Tensor | None:
    """The router's distribution over all experts, float32 [T, E]; None for an unknown rule.

    A softmax, whether taken before or after the choice; for sigmoid rules the scores divided by their sum.
    """
    if rule == "unknown":
        return None
    if "sigmoid" in rule:
        scores_TE = logits_TE.float().sigmoid()
        return scores_TE / scores_TE.sum(-1, keepdim=True)
    return logits_TE.float().softmax(-1)


def entropy(distribution_TE: Tensor) -> Tensor:
    """Entropy of each row in nats: 0 for one certain expert, ln E for no preference."""
    nats_T: Tensor = torch.special.entr(distribution_TE).sum(-1)
    return nats_T


def margin(rule: Rule, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Lowest chosen logit − highest logit left out; how far the input may move before the choice flips.

    NaN where logits alone do not decide, in padding, and where no expert is left out.
    """
    logits_TE = logits_TE.float()
    nothing_T = logits_TE.new_full((len(logits_TE),), float("nan"))
    if rule not in CHOSEN_BY_LOGIT:
        return nothing_T
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    chosen_TE.scatter_(-1, experts_TK.clamp(min=0), value=True)
    lowest_T = logits_TE.masked_fill(~chosen_TE, float("inf")).amin(-1)
    highest_T = logits_TE.masked_fill(chosen_TE, float("-inf")).amax(-1)
    defined_T = (experts_TK >= 0).all(-1) & highest_T.isfinite()
    return (lowest_T - highest_T).where(defined_T, nothing_T)
