"""The divergence that settings name, with its parameter bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from core.distill.losses import forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl
from core.distill.settings import Loss

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Callable[["Tensor", "Tensor"], "Tensor"]
"""(log p, log q), each [N, outcomes] → nats [N]."""


def named(loss: Loss, *, beta: float = 0.5, alpha: float = 0.1) -> Divergence:
    """The divergence of that name; ``beta`` is jsd's, ``alpha`` the skewed ones'."""
    found: dict[Loss, Divergence] = {
        "forward_kl": forward_kl.divergence,
        "reverse_kl": reverse_kl.divergence,
        "jsd": partial(jsd.divergence, beta=beta),
        "skew_kl": partial(skew_kl.divergence, alpha=alpha),
        "skew_reverse_kl": partial(skew_reverse_kl.divergence, alpha=alpha),
    }
    return found[loss]
