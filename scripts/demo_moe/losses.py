"""What keeps experts in use, and what makes them specialise, added to the language model's own loss.

Legend: L layers, E experts, K top-k, T tokens, B sequences, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shares(chosen_TK: Tensor, n_experts: int) -> Tensor:
    """How many of a token's K choices each expert gets on average, float32 [E]; sums to K."""
    counts_E = torch.bincount(chosen_TK.reshape(-1), minlength=n_experts)
    return counts_E.float() / len(chosen_TK)


def load_balance(share_LE: Tensor, probability_LE: Tensor) -> Tensor:
    """E · Σ_e share · probability of each layer, [L]: K when every layer is uniform, E when K experts take it all.

    One number per layer on purpose: transformers' ``load_balancing_loss_func`` pools the layers first, so layers that
    each collapsed on experts of their own score as if balanced.
    """
    return share_LE.shape[1] * (share_LE * probability_LE).sum(1)


def router_z(logits_TE: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router's logits: keeps them small (ST-MoE, 2202.08906)."""
    return logits_TE.logsumexp(-1).square().mean()


def within_pools(logits_BPE: Tensor, sizes_B: Tensor) -> Tensor:
    """Logits with −inf for experts outside each sequence's pool: its ``size`` most probable experts on average.

    A sequence that may only use few experts makes these learn what its domain needs (document pools, EMO). A size of
    E or more leaves the sequence free.
    """
    liked_BE = logits_BPE.detach().softmax(-1).mean(1)
    rank_BE = liked_BE.argsort(-1, descending=True).argsort(-1)
    return logits_BPE.masked_fill((rank_BE >= sizes_B[:, None])[:, None, :], -torch.inf)
