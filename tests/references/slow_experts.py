"""What criteria of expert pruning mean, one token and one expert at a time, in float64 where that is free.

Nothing here comes from ``core.routing``: decisions are read by a hook of this file, kept sets are cut by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch


def decisions(model: Any, experts_path: str, ids: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """(hidden, chosen experts, routing weights) that the experts module was called with."""
    seen: list[tuple[torch.Tensor, ...]] = []
    hook = model.get_submodule(experts_path).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(a.clone() for a in (*args, *kwargs.values()))),
        with_kwargs=True,
    )
    try:
        with torch.inference_mode():
            model(torch.tensor([list(ids)]))
    finally:
        hook.remove()
    return seen[-1]


def norm_of(experts: Any, hidden_D: torch.Tensor, expert: int) -> float:
    """‖f_e(x)‖ of one token."""
    with torch.inference_mode():
        out = experts(hidden_D[None], torch.tensor([[expert]]), torch.ones(1, 1))
    return float(out.double().norm())


def sums(
    model: Any, experts_path: str, texts: Sequence[Sequence[int]], n_experts: int
) -> dict[str, list[float]]:
    """|X_j|, Σ‖f‖, Σ‖f‖², Σ g‖f‖ of every expert."""
    experts = model.get_submodule(experts_path)
    found = {name: [0.0] * n_experts for name in ("count", "norm", "square", "gated")}
    for ids in texts:
        hidden, chosen, weights = decisions(model, experts_path, ids)
        for token in range(len(hidden)):
            for slot, expert in enumerate(chosen[token].tolist()):
                norm = norm_of(experts, hidden[token], expert)
                found["count"][expert] += 1
                found["norm"][expert] += norm
                found["square"][expert] += norm**2
                found["gated"][expert] += float(weights[token, slot]) * norm
    return found


def loss_of_kept(block: Any, hidden_TD: torch.Tensor, kept: Sequence[int]) -> float:
    """‖F − F_kept‖ of a MoE block called ``gate`` and ``experts`` (Mixtral, OLMoE, Qwen), cut by hand."""
    small = copy.deepcopy(block)
    for module, name in (
        (small.gate, "weight"),
        (small.experts, "gate_up_proj"),
        (small.experts, "down_proj"),
    ):
        setattr(module, name, torch.nn.Parameter(getattr(module, name)[list(kept)], requires_grad=False))
        module.num_experts = len(kept)
    with torch.inference_mode():
        return float((small(hidden_TD[None]) - block(hidden_TD[None])).double().norm())
