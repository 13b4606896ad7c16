"""Heads and neurons as tensors: the projections of a block cut the way its anatomy says.

Legend: ``B`` batch, ``P`` position, ``H`` query head, ``G`` key/value head, ``K`` head_dim, ``D`` d_model,
``N`` neuron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from core.models.anatomy import Anatomy, Block

if TYPE_CHECKING:
    from torch import Tensor


def split_heads(anatomy: Anatomy, output: Tensor, part: Literal["q", "k", "v"]) -> Tensor:
    """Cut the output of the module at ``block.q``, ``.k`` or ``.v`` into heads: [B, P, H or G, K].

    Before rotary positions and q/k norms.
    """
    index = "qkv".index(part)
    lead = output.shape[:-1]
    if anatomy.fusion == "separate":
        return output.view(*lead, -1, anatomy.head_dim)
    if anatomy.fusion == "concatenated":
        heads = (anatomy.n_heads, anatomy.n_kv_heads, anatomy.n_kv_heads)
        all_heads = output.view(*lead, -1, anatomy.head_dim)
        return all_heads.narrow(-2, sum(heads[:index]), heads[index])
    return output.view(*lead, anatomy.n_heads, 3, anatomy.head_dim)[..., index, :]


def to_query_heads(anatomy: Anatomy, grouped: Tensor) -> Tensor:
    """Repeat key/value heads [B, P, G, K] so that entry h is what query head h reads: [B, P, H, K]."""
    return grouped[..., [anatomy.kv_head(head) for head in range(anatomy.n_heads)], :]


def output_weight(model: Any, anatomy: Anatomy, block: Block) -> Tensor:
    """W_O cut by head, [H, K, D]: head h writes z_h · W_O[h] to the residual stream."""
    weight_ID = input_first(model.get_submodule(block.o))
    return weight_ID.view(anatomy.n_heads, anatomy.head_dim, anatomy.d_model)


def neuron_weight(model: Any, block: Block) -> Tensor:
    """What each neuron of a dense MLP writes, [N, D]: the MLP's output is activations · this (+ bias)."""
    assert block.down is not None, f"{block.path} is a mixture of experts, it has no single down projection"
    return input_first(model.get_submodule(block.down))


def input_first(linear: Any) -> Tensor:
    """A projection's weight as [in, out]; Linear stores the transpose, GPT-2's Conv1D stores it so."""
    weight: Tensor = linear.weight
    return weight if hasattr(linear, "nf") else weight.T
