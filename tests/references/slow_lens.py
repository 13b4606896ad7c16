"""Mixtures of experts one token and one slot at a time: what the lens and its counts must equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def expert_output(experts: Any, expert: int, hidden_D: Tensor) -> Tensor:
    """f_e(x) of one token, from the layout flags of a fused experts module and plain matrix products."""

    def project(name: str, x: Tensor) -> Tensor:
        weight = getattr(experts, name)[expert]
        projected = x @ weight if experts.is_transposed else weight @ x
        return projected + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else projected

    if not experts.has_gate:
        inner = experts.act_fn(project("up_proj", hidden_D))
    elif experts.is_concatenated:
        gate, up = project("gate_up_proj", hidden_D).chunk(2)
        inner = experts.act_fn(gate) * up
    else:  # gpt-oss: interleaved, clamped, and up moved by one
        gate_up = project("gate_up_proj", hidden_D)
        gate, up = gate_up[::2].clamp(max=experts.limit), gate_up[1::2].clamp(-experts.limit, experts.limit)
        inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    out = project("down_proj", inner)
    return experts.post_expert_norm(out) if experts.has_post_expert_norm else out


def counts(experts_LTK: Sequence[Any], layers: range) -> dict[str, Counter[Any]]:
    """Load, co-activation and flow, counted pair by pair; -1 counts for nothing."""
    found: dict[str, Counter[Any]] = {"load": Counter(), "pairs": Counter(), "flow": Counter()}
    for layer in layers:
        for token, chosen in enumerate(experts_LTK[layer]):
            here = [int(e) for e in chosen if e >= 0]
            found["load"].update((layer, e) for e in here)
            found["pairs"].update((layer, a, b) for a in here for b in here)
            if layer + 1 in layers:
                there = [int(e) for e in experts_LTK[layer + 1][token] if e >= 0]
                found["flow"].update((layer, a, b) for a in here for b in there)
    return found
