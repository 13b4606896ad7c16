"""The gradient of one number with respect to every node of a kind, at all layers and positions, in one backward pass.

Legend: P prompt positions, D d_model, E head_dim. Nodes and their shapes are those of ``_recording.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from core.intervene import intervene
from core.lazy import torch
from core.models.gradients import differentiable
from core.probes._kernel import Kernel, attention_by
from core.probes._recording import Node

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


def node_gradients(
    loaded: LoadedModel, inputs: Mapping[str, Tensor], node: Node, measure: Callable[[Tensor], Tensor]
) -> tuple[tuple[Tensor, ...], float]:
    """Per layer ∂m/∂node, [P, D] or [P, heads, E], and m itself; ``measure`` maps last-position logits [1, V] to m.

    Costs one forward and one backward pass. Call ``require_gradients`` first; hold ``loaded.lock``.
    """
    anatomy, model = loaded.anatomy, loaded.model
    held: dict[int, Tensor] = {}
    paths: dict[str, int] = {}
    if node == "residual":
        paths = {block.path: block.index for block in anatomy.blocks}
    elif node == "attention_out":
        paths = {block.attention_write: block.index for block in anatomy.blocks}
    elif node == "mlp_out":
        paths = {block.mlp_write: block.index for block in anatomy.blocks}

    def hold(path: str, state: Tensor) -> Tensor:
        held[paths[path]] = state
        return state

    def stand_in(
        layer: int, kernel: Kernel, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, arguments: Any
    ) -> Tensor:
        z, _ = kernel(module, q, k, v, mask, **arguments)
        held[layer] = {"q": q, "k": k, "v": v, "z": z}[node]
        return z

    with differentiable(), ExitStack() as stack:
        stack.enter_context(intervene(model, [anatomy.embedding], _as_leaf))
        if paths:
            stack.enter_context(intervene(model, list(paths), hold, inputs=node == "residual"))
        else:
            stack.enter_context(attention_by(loaded, stand_in))
        own = {
            name: tensor.clone() for name, tensor in inputs.items()
        }  # a tensor of inference mode has no gradient
        logits = model(**own, use_cache=False, logits_to_keep=1).logits
        value = measure(logits[:, -1])[0]
        gradients = torch.autograd.grad(value, [held[layer] for layer in range(anatomy.n_layers)])
    return tuple(_shaped(gradient, node, anatomy.d_model) for gradient in gradients), float(value.detach())


def _as_leaf(path: str, state: Tensor) -> Tensor:
    return state.detach().clone().requires_grad_()


def _shaped(gradient: Tensor, node: Node, d_model: int) -> Tensor:
    """To the shapes of a recording: kernels take q, k, v as [1, heads, P, E] and give z as [1, P, heads, E]."""
    if node in ("q", "k", "v"):
        return gradient[0].transpose(0, 1)
    return gradient[0] if node == "z" else gradient.view(-1, d_model)
