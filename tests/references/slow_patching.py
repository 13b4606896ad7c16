"""Patching as it is usually written: one whole forward per cell, hooks on the model's own modules.

Shares nothing with ``core``: q, k and v are set before rotary positions, at the projections (or in their fused
output), a head's values at the output projection's input.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from core.models.loaded import LoadedModel


def slow_states(loaded: LoadedModel, ids: list[int]) -> dict[str, list[torch.Tensor]]:
    """What one forward holds: node → per layer [P, width] (all heads side by side for q, k, v, z)."""
    found: dict[str, dict[int, torch.Tensor]] = {}

    def keep(node: str, layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            tensor = _taken(node, args, kwargs) if node in ("residual", "z") else _first(output)
            found.setdefault(node, {})[layer] = tensor.detach().clone().reshape(len(ids), -1)

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for layer, sites in enumerate(_sites(loaded)):
            for node, (path, _) in sites.items():
                module = loaded.model.get_submodule(path)
                hooks.callback(module.register_forward_hook(keep(node, layer), with_kwargs=True).remove)
        loaded.model(torch.tensor([ids]), use_cache=False)
    states = {node: [by_layer[n] for n in sorted(by_layer)] for node, by_layer in found.items()}
    return {
        node: [state[:, sites[node][1]] for state, sites in zip(state_of_layers, _sites(loaded), strict=True)]
        for node, state_of_layers in states.items()
    }


def slow_patched_logits(
    loaded: LoadedModel,
    ids: list[int],
    *,
    node: str,
    layer: int,
    positions: list[int],
    value: torch.Tensor,
    head: int | None = None,
) -> torch.Tensor:
    """Logits [P, vocab] of one whole forward with ``value`` [len(positions), width] written at one node."""
    path, columns = _sites(loaded)[layer][node]
    width = value.shape[-1]
    if head is not None:
        columns = columns[head * width : (head + 1) * width]

    def write(tensor: torch.Tensor) -> torch.Tensor:
        new = tensor.clone()
        flat = new.view(len(ids), -1)
        for row, position in enumerate(positions):
            flat[position, columns] = value[row]
        return new

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (write(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": write(kwargs["hidden_states"])}

    def after(module: Any, args: Any, output: Any) -> Any:
        return (write(output[0]), *output[1:]) if isinstance(output, tuple) else write(output)

    module = loaded.model.get_submodule(path)
    if node in ("residual", "z"):
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return logits


def _sites(loaded: LoadedModel) -> list[dict[str, tuple[str, torch.Tensor]]]:
    """Per layer: node → (module, the columns of its state that are this node)."""
    a = loaded.anatomy
    width = a.head_dim
    sizes = {"q": a.n_heads * width, "k": a.n_kv_heads * width, "v": a.n_kv_heads * width}
    every = torch.arange(a.d_model)
    sites = []
    for block in a.blocks:
        if a.fusion == "separate":
            columns = {name: torch.arange(size) for name, size in sizes.items()}
        elif a.fusion == "concatenated":
            columns = {name: torch.arange(a.d_model) + n * a.d_model for n, name in enumerate(sizes)}
        else:  # [q k v] head by head
            per_head = torch.arange(a.n_heads * 3 * width).view(a.n_heads, 3, width)
            columns = {name: per_head[:, n].flatten() for n, name in enumerate(sizes)}
        sites.append(
            {
                "residual": (block.path, every),
                "attention_out": (block.attention_write, every),
                "mlp_out": (block.mlp_write, every),
                "z": (block.o, torch.arange(a.n_heads * width)),
                "q": (_normed(loaded, block.q), columns["q"]),
                "k": (_normed(loaded, block.k), columns["k"]),
                "v": (block.v, columns["v"]),
            }
        )
    return sites


def _normed(loaded: LoadedModel, projection: str) -> str:
    """OLMoE norms q and k over all heads together: only after that norm does a head stand for itself."""
    norm = projection.replace("_proj", "_norm")
    owner = dict(loaded.model.named_modules()).get(norm)
    return norm if owner is not None and len(owner.weight) > loaded.anatomy.head_dim else projection


def _taken(node: str, args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
