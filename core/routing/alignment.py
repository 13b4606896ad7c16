"""Bringing one expert's neurons into the order of another's, so that averaging them averages like with like.

An expert computes Σ_i down_i · h_i(x); the order of its neurons i is arbitrary, so two trained experts that do the same
may list their neurons differently. Reordering gate, up and down alike leaves the function as it is. The order is the
cheapest assignment (Hungarian algorithm, https://doi.org/10.1002/nav.3800020109) of neurons to neurons, at the cost REAM
uses (arXiv 2604.04356 §4): distance of what the neurons do plus distance of their weights.

Legend: ``I`` neurons of an expert (its intermediate size), ``D`` hidden, ``T`` tokens, ``N`` numbers of one neuron.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.routing.surgery import ExpertWeights

Ints = NDArray[np.int64]


def neuron_activations(experts: Any, expert: int, hidden_TD: Tensor) -> Tensor:
    """[T, I]: what the neurons of one expert of a fused experts module put into its down projection."""
    gated = hasattr(experts, "gate_up_proj")
    fused = experts.gate_up_proj if gated else experts.up_proj
    # Llama-4's experts, outside the shared contract, multiply from the right and have gate and up side by side.
    weight = fused[expert] if getattr(experts, "is_transposed", True) else fused[expert].T
    inner = hidden_TD.to(weight.dtype) @ weight
    if getattr(experts, "has_bias", False):
        inner = inner + (experts.gate_up_proj_bias if gated else experts.up_proj_bias)[expert]
    found: Tensor
    if not gated:
        found = experts.act_fn(inner)
    elif hasattr(experts, "_apply_gate"):
        found = experts._apply_gate(inner)
    else:
        gate, up = inner.chunk(2, dim=-1)
        found = experts.act_fn(gate) * up
    return found


def neuron_cost(
    reference: ExpertWeights, other: ExpertWeights, activations_TI: Tensor, other_activations_TI: Tensor
) -> Tensor:
    """[I, I]: how unlike neuron i of ``reference`` and neuron j of ``other`` are: in activation plus in weights.

    Activations are compared as unit vectors over the tokens, weights as they are; each distance is scaled to 0–1 over
    all pairs, so that neither rules by its unit.
    """
    done = torch.cdist(_unit(activations_TI.T.double()), _unit(other_activations_TI.T.double()))
    held = torch.cdist(_neurons(reference), _neurons(other))
    return _to_unit_range(done) + _to_unit_range(held)


def cheapest_order(cost_II: Tensor) -> Ints:
    """For each neuron of the reference the other's neuron that takes its place, at the smallest total cost."""
    from scipy.optimize import linear_sum_assignment

    found: Ints = linear_sum_assignment(cost_II.cpu().numpy())[1].astype(np.int64)
    return found


def reordered(expert: ExpertWeights, order_I: Ints) -> ExpertWeights:
    """The same function with neuron ``order_I[i]`` in place i: rows of gate and up, columns of down, their biases."""
    order = torch.as_tensor(order_I)
    moved = {}
    for field in fields(expert):
        tensor = getattr(expert, field.name)
        if tensor is None or field.name in _OUTSIDE:
            continue
        moved[field.name] = tensor[..., order] if field.name in _COLUMNS else tensor[order]
    return replace(expert, **moved)


_COLUMNS = ("down_DI",)
"""Parts of an expert whose last axis counts its neurons; of the others it is the first."""
_OUTSIDE = ("down_bias_D",)
"""Parts that no neuron owns."""


def _neurons(expert: ExpertWeights) -> Tensor:
    """[I, N]: all numbers that belong to each neuron, side by side."""
    parts = []
    for field in fields(expert):
        tensor = getattr(expert, field.name)
        if tensor is None or field.name in _OUTSIDE:
            continue
        tensor = tensor.double()
        parts.append(tensor.T if field.name in _COLUMNS else tensor.reshape(len(tensor), -1))
    return torch.cat(parts, -1)


def _unit(rows_NK: Tensor) -> Tensor:
    """Rows of length 1; a neuron that never fires stays zero."""
    unit_NK: Tensor = rows_NK / rows_NK.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return unit_NK


def _to_unit_range(distance_II: Tensor) -> Tensor:
    low, high = distance_II.aminmax()
    return (distance_II - low) / (high - low).clamp(min=1e-30)
