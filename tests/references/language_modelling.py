"""Language-modelling scores the slow, obvious way: one forward per token, plain float64 formulas, no windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def naive_scores(
    base: Any, variant: Any, ids: list[int], first_scored: int, *, begin: Callable[[int], int]
) -> dict[str, list[Any]]:
    """Per scored token: nats under both models, KL over the whole vocabulary, and both top tokens.

    Each token is predicted from the tokens before it, from ``begin(position)`` on.
    """
    rows: dict[str, list[Any]] = {
        "nats_base": [],
        "nats_variant": [],
        "kl": [],
        "top_base": [],
        "top_variant": [],
    }
    for position in range(first_scored, len(ids)):
        before = torch.tensor([ids[begin(position) : position]])
        with torch.no_grad():
            p_log = torch.log_softmax(base(before).logits[0, -1].double(), -1)
            q_log = torch.log_softmax(variant(before).logits[0, -1].double(), -1)
        rows["nats_base"].append(-p_log[ids[position]].item())
        rows["nats_variant"].append(-q_log[ids[position]].item())
        rows["kl"].append(sum(p_log.exp() * (p_log - q_log)).item())
        rows["top_base"].append(int(p_log.argmax()))
        rows["top_variant"].append(int(q_log.argmax()))
    return rows
