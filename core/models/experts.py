"""One expert of a fused experts module, as plain tensor algebra, whatever way its family stores it.

Knows the flags of transformers' experts contract: [out, in] or transposed, with or without biases and gate. The gate
itself (concatenated, interleaved, clamped) is the family's own code. It knows no routing.

Legend: ``D`` d_model, ``N`` neurons of one expert; inputs may have any dimensions before their last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.models.anatomy_layouts import SCALED_INPUT_EXPERTS

if TYPE_CHECKING:
    from torch import Tensor


def expert_neurons(experts: Any, expert: int, read_D: Tensor) -> Tensor:
    """The expert's neurons [N] on one input: what its down projection multiplies."""
    if not getattr(experts, "has_gate", True):
        neurons_N: Tensor = experts.act_fn(_through(experts, "up_proj", expert, read_D))
    elif hasattr(experts, "_apply_gate"):
        neurons_N = experts._apply_gate(_through(experts, "gate_up_proj", expert, read_D))
    else:
        gate_N, up_N = _through(experts, "gate_up_proj", expert, read_D).chunk(2, dim=-1)
        neurons_N = experts.act_fn(gate_N) * up_N
    return neurons_N


def expert_output(experts: Any, expert: int, read_D: Tensor) -> Tensor:
    """f_e(x), [D]: what the expert gives before its routing weight."""
    output_D = expert_neurons(experts, expert, read_D) @ down_weight(experts, expert)
    bias_D = down_bias(experts, expert)
    return output_D if bias_D is None else output_D + bias_D


def gate_and_up(experts: Any, expert: int, read_D: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both halves before the activation, [N] each; None where experts have no gate or one of their own kind."""
    gate = getattr(type(experts), "_apply_gate", None)
    plain = gate is None or gate.__name__ == "_default_apply_gate"
    if not (plain and getattr(experts, "has_gate", True)):
        return None
    gate_N, up_N = _through(experts, "gate_up_proj", expert, read_D).chunk(2, dim=-1)
    return gate_N, up_N


def down_weight(experts: Any, expert: int) -> Tensor:
    """What each neuron of the expert writes, [N, D]."""
    weight: Tensor = experts.down_proj[expert]
    return weight if is_transposed(experts) else weight.T


def down_bias(experts: Any, expert: int) -> Tensor | None:
    """What the expert writes whatever it read, [D]; None where experts have no biases."""
    bias = getattr(experts, "down_proj_bias", None)
    return None if bias is None else bias[expert]


def is_scaled_input(experts: Any) -> bool:
    """Whether every expert reads every token, scaled by its routing weight (Llama-4), instead of the chosen alone."""
    return type(experts).__name__ in SCALED_INPUT_EXPERTS


def is_transposed(experts: Any) -> bool:
    """Whether matrices are stored [in, out]; Llama-4's, outside the contract, are."""
    return bool(getattr(experts, "is_transposed", True))


def _through(experts: Any, name: str, expert: int, read_D: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    product: Tensor = read_D @ (weight if is_transposed(experts) else weight.T)
    bias = getattr(experts, f"{name}_bias", None)
    return product if bias is None else product + bias[expert]
