"""The identities of a mixture of experts: that its experts, weighted as the model chose, sum to what it gives.

One half of ``anatomy_verify.py``. The choice is always the model's own, never computed again from the router's logits.

Legend: ``T`` batch · position, ``D`` d_model, ``E`` expert, ``K`` slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from core.lazy import torch
from core.models.anatomy import Anatomy, Block
from core.models.anatomy_trace import Check, Trace
from core.models.experts import expert_neurons, expert_output, gate_and_up, is_scaled_input

if TYPE_CHECKING:
    from torch import Tensor


def check_experts(model: Any, anatomy: Anatomy, block: Block, trace: Trace) -> Iterator[Check]:
    """Identity 19: Σ_e w_e E_e(x) (+ shared expert) is what the block gives."""
    experts = model.get_submodule(str(block.experts))
    if is_scaled_input(experts):
        yield from _check_scaled_inputs(model, anatomy, block, trace)
        return
    path = str(block.experts)
    chosen_TK, weight_TK = trace.chosen[path], trace.routing_weight[path]
    read_TD = trace.fed[path]
    distinct_T = torch.tensor([len(set(row)) for row in chosen_TK.tolist()], dtype=torch.float32)
    yield _distinct(path, distinct_T, anatomy)
    yield from _check_gate(experts, anatomy, path, read_TD)
    summed_TD = torch.zeros_like(read_TD)
    for token, (row, weights) in enumerate(zip(chosen_TK.tolist(), weight_TK, strict=True)):
        for expert, weight in zip(row, weights, strict=True):
            summed_TD[token] += weight * expert_output(experts, expert, read_TD[token])
    yield Check("weighted experts sum to their output", path, summed_TD, trace.output[path])
    yield _whole(model, block, trace, summed_TD)


def _check_scaled_inputs(model: Any, anatomy: Anatomy, block: Block, trace: Trace) -> Iterator[Check]:
    """Llama-4: every expert reads every token times its routing weight, which is 0 for those not chosen."""
    path = str(block.experts)
    experts = model.get_submodule(path)
    read_TD = trace.fed[str(block.mlp)].flatten(0, -2)
    weight_TE = trace.scores[str(block.router)]
    yield _distinct(str(block.router), (weight_TE > 0).sum(-1).float(), anatomy)
    yield from _check_gate(experts, anatomy, path, read_TD)
    scaled_ETD = read_TD * weight_TE.T[..., None]
    yield Check("experts read inputs scaled by weight", path, scaled_ETD.flatten(0, 1), trace.fed[path])
    given_ETD = torch.stack([expert_output(experts, e, read) for e, read in enumerate(scaled_ETD)])
    yield Check("weighted experts sum to their output", path, given_ETD.flatten(0, 1), trace.output[path])
    yield _whole(model, block, trace, given_ETD.sum(0))


def _distinct(path: str, distinct_T: Tensor, anatomy: Anatomy) -> Check:
    wanted_T = torch.full_like(distinct_T, anatomy.experts_per_token)
    name = "each token has its number of distinct experts"
    return Check(name, path, distinct_T[:, None], wanted_T[:, None])


def _check_gate(experts: Any, anatomy: Anatomy, path: str, read_TD: Tensor) -> Iterator[Check]:
    """The anatomy's activation, where the experts' gate is the plain one; families with a gate of their own say nothing."""
    parts = gate_and_up(experts, 0, read_TD)
    if parts is not None:
        expected = activation_function(anatomy.activation)(parts[0]) * parts[1]
        yield Check(
            "experts' neurons are act(gate) ⊙ up", path, expert_neurons(experts, 0, read_TD), expected
        )


def _whole(model: Any, block: Block, trace: Trace, summed_TD: Tensor) -> Check:
    """The routed experts and the shared one against the block's output."""
    path = str(block.mlp)
    if block.shared_expert is not None:
        summed_TD = summed_TD + _shared(model, block, trace.fed[path]).view_as(summed_TD)
    return Check("experts sum to MLP output", path, summed_TD, trace.output[path].view_as(summed_TD))


def _shared(model: Any, block: Block, read: Tensor) -> Tensor:
    """A shared expert sees every token; Qwen2-MoE scales it by a sigmoid gate beside it."""
    shared: Tensor = model.get_submodule(str(block.shared_expert))(read)
    if block.shared_gate is None:
        return shared
    return torch.sigmoid(model.get_submodule(block.shared_gate)(read)) * shared


def activation_function(name: str) -> Any:
    """The activation that transformers calls by this name."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]
