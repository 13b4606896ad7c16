"""Editing a mixture of experts in place: fewer experts, another top-k, other weights inside an expert.

Every edit leaves the model as plain transformers would build it from its edited config, so that what is saved
reloads with ``AutoModel``: the same number of experts in every layer, because no config key says otherwise. Families
store experts transposed, interleaved or without a gate; here is the one place that knows it. What to keep is decided
elsewhere. Everything is checked before anything is changed.

Legend: ``E`` experts, ``D`` hidden, ``I`` expert intermediate, ``F`` gate and up side by side (2 I).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import BadInput
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.routing.discover import EXPERT_COUNTS, MoeLayer, moe_layers

if TYPE_CHECKING:
    from torch import Tensor

TOP_K = "num_experts_per_tok"
"""What configs and whole models call the experts per token; routers and MoE blocks call it ``top_k``."""
SCORED_PER_GROUP = {"sigmoid_bias": 2, "sigmoid_bias_renorm": 2}
"""Rule → experts whose scores a group's strength sums; a group must keep at least as many."""


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """One expert's matrices as ``nn.Linear`` stores them, [out, in], whatever its family does; copies."""

    gate_ID: Tensor | None
    """None for an expert without a gate."""
    up_ID: Tensor
    down_DI: Tensor
    gate_bias_I: Tensor | None = None
    up_bias_I: Tensor | None = None
    down_bias_D: Tensor | None = None


def experts_of(loaded: LoadedModel) -> tuple[MoeLayer, ...]:
    """The MoE layers of a model; raises ``BadInput`` for a dense one, or where layers differ in their experts."""
    found = moe_layers(loaded.model)
    if not found:
        raise BadInput(
            f"{loaded.ref} is dense: it has no experts to choose from; make a mixture of experts of it with upcycle"
        )
    counts = sorted({layer.n_experts for layer in found})
    if len(counts) > 1:
        raise BadInput(
            f"{loaded.ref} has layers of {' and '.join(map(str, counts))} experts; only equal counts can be edited"
        )
    return found


def check_kept(layers: Sequence[MoeLayer], kept: Mapping[int, Sequence[int]]) -> None:
    """Raise ``BadInput`` unless ``kept`` (layer → experts in their new order) is a mixture that could be saved."""
    known = [layer.layer for layer in layers]
    if sorted(kept) != known:
        raise BadInput(
            f"experts to keep are given for the layers {sorted(kept)}, but the MoE layers are {known}; name every one"
        )
    counts = {len(experts) for experts in kept.values()}
    if len(counts) > 1:
        raise BadInput(
            f"layers would keep {' or '.join(map(str, sorted(counts)))} experts; plain transformers reloads only the "
            "same number in every layer"
        )
    for layer in layers:
        _check_layer(layer, list(kept[layer.layer]))


def check_count(layers: Sequence[MoeLayer], n_kept: int) -> None:
    """Raise ``BadInput`` unless every layer can keep ``n_kept`` experts, before anybody decides which."""
    for layer in layers:
        size, each = layer.n_experts // layer.n_groups, n_kept // layer.n_groups
        even = [g * size + e for g in range(layer.n_groups) for e in range(each)]
        _check_layer(layer, even if len(even) == n_kept else list(range(n_kept)))


def _check_layer(layer: MoeLayer, kept: list[int]) -> None:
    where, n = f"layer {layer.layer}", layer.n_experts
    wrong = [e for e in kept if not 0 <= e < n]
    if wrong or len(set(kept)) < len(kept):
        raise BadInput(f"{where}: {wrong or kept} are not distinct experts among 0 to {n - 1}")
    if len(kept) < layer.top_k:
        raise BadInput(
            f"{where} would keep {len(kept)} experts but routes each token to {layer.top_k}; keep at least "
            f"{layer.top_k}, or lower the experts per token first (reduce_top_k)"
        )
    if layer.n_groups == 1:
        return
    size, rest = divmod(len(kept), layer.n_groups)
    old = n // layer.n_groups
    origin = [{e // old for e in kept[i : i + size]} for i in range(0, len(kept), size)] if size else []
    whole = not rest and len(set().union(*origin)) == layer.n_groups and all(len(o) == 1 for o in origin)
    if not whole:
        raise BadInput(
            f"{where} routes by {layer.n_groups} groups of {old} experts: keep the same number of every group, "
            f"group after group, so a multiple of {layer.n_groups}"
        )
    least = SCORED_PER_GROUP.get(layer.rule, 1)
    if size < least or size * layer.top_groups < layer.top_k:
        raise BadInput(
            f"{where} would keep {size} experts in each of {layer.n_groups} groups, but a token chooses {layer.top_k} "
            f"from {layer.top_groups} groups, and a group is ranked by its best {least}; keep more"
        )


def keep_experts(loaded: LoadedModel, kept: Mapping[int, Sequence[int]]) -> None:
    """Keep only these experts of each layer (block index → experts), in the order given, which becomes theirs.

    Cut are all parameters and buffers of router, experts and MoE block that have one row per expert, the counts on
    the modules, and the config's key. All experts in another order is a permutation. Raises ``BadInput`` or
    ``CannotCompress`` with the model unchanged.
    """
    loaded.refuse_if_packed()
    layers = experts_of(loaded)
    check_kept(layers, kept)
    for layer in layers:
        keep_in_layer(loaded, layer, kept[layer.layer])
    settle_counts(loaded, layers[0].n_experts, len(kept[layers[0].layer]))


def keep_in_layer(loaded: LoadedModel, layer: MoeLayer, kept: Sequence[int]) -> None:
    """Keep only these experts of one layer, for a method that must run the model before it decides on the next.

    The model runs, but its config still counts the experts there were: end with ``settle_counts``. What is kept must
    pass ``check_kept``.
    """
    index_K = torch.tensor(list(kept), device=loaded.device)
    for module in _routed_modules(loaded.model.get_submodule(layer.mlp), layer):
        _cut(module, index_K, layer.n_experts)
        _set_counts(module, EXPERT_COUNTS, layer.n_experts, len(kept))


def settle_counts(loaded: LoadedModel, before: int, after: int) -> None:
    """Write the new number of experts wherever the config and the whole model name it, and take the model up anew."""
    model = loaded.model
    config = model.config.get_text_config()
    for name in EXPERT_COUNTS:
        # one key under several names, by the config's attribute_map
        if getattr(config, name, None) == before:
            setattr(config, name, after)
    for module in model.modules():
        _set_counts(module, EXPERT_COUNTS, before, after)
    loaded.become(model)


def set_top_k(loaded: LoadedModel, top_k: int) -> None:
    """Route each token to ``top_k`` experts in every layer, weights normalised as the router does it.

    Raises ``BadInput`` where there are not as many to choose from, with the model unchanged.
    """
    loaded.refuse_if_packed()
    layers = experts_of(loaded)
    least = min(layer.n_experts // layer.n_groups * layer.top_groups for layer in layers)
    if not 1 <= top_k <= least:
        raise BadInput(f"top_k={top_k}: a token can be routed to 1 to {least} experts of this model")
    before = {layer.top_k for layer in layers}
    if len(before) > 1:
        raise BadInput(
            f"layers route to {sorted(before)} experts per token; only an equal number can be edited"
        )
    old = before.pop()
    setattr(loaded.model.config.get_text_config(), TOP_K, top_k)
    for module in loaded.model.modules():
        _set_counts(module, (TOP_K, "top_k"), old, top_k)
    loaded.become(loaded.model)


def read_expert(loaded: LoadedModel, layer: int, expert: int) -> ExpertWeights:
    """Copies of one expert's weights, laid out as linear layers."""
    experts = experts_module(loaded, layer)
    gated = hasattr(experts, "gate_up_proj")
    first = "gate_up_proj" if gated else "up_proj"
    gate_ID, up_ID = _halves(experts, _matrix(experts, first)[expert], gated)
    gate_bias_I = up_bias_I = down_bias_D = None
    if hasattr(experts, "down_proj_bias"):
        gate_bias_I, up_bias_I = _halves(experts, getattr(experts, f"{first}_bias")[expert], gated)
        down_bias_D = experts.down_proj_bias[expert].clone()
    down_DI = _matrix(experts, "down_proj")[expert].clone()
    return ExpertWeights(gate_ID, up_ID, down_DI, gate_bias_I, up_bias_I, down_bias_D)


def write_expert(loaded: LoadedModel, layer: int, expert: int, weights: ExpertWeights) -> None:
    """Replace one expert's weights in place; shapes and presence of gate and biases must be those it has."""
    loaded.refuse_if_packed()
    experts = experts_module(loaded, layer)
    gated = hasattr(experts, "gate_up_proj")
    first = "gate_up_proj" if gated else "up_proj"
    with torch.no_grad():
        _matrix(experts, first)[expert].copy_(_joined(experts, weights.gate_ID, weights.up_ID))
        _matrix(experts, "down_proj")[expert].copy_(weights.down_DI)
        if hasattr(experts, "down_proj_bias"):
            assert weights.up_bias_I is not None, "this family's experts have biases"
            assert weights.down_bias_D is not None, "this family's experts have biases"
            bias_F = _joined(experts, weights.gate_bias_I, weights.up_bias_I)
            getattr(experts, f"{first}_bias")[expert].copy_(bias_F)
            experts.down_proj_bias[expert].copy_(weights.down_bias_D)


def experts_module(loaded: LoadedModel, layer: int) -> Any:
    """The fused experts module of a block; raises ``BadInput`` for a block without one."""
    blocks = {block.index: block.experts for block in loaded.anatomy.blocks if block.experts}
    if layer not in blocks:
        raise BadInput(f"layer {layer} has no experts; the MoE layers are {sorted(blocks)}")
    return loaded.model.get_submodule(blocks[layer])


def restricted_block(loaded: LoadedModel, layer: MoeLayer, kept: Sequence[int], experts: Any) -> Any:
    """The layer's MoE block with a router that knows only ``kept`` and other ``experts``; shares its other weights.

    ``experts`` is called like the block's own, with indices into ``kept``. The model itself is not changed.
    """
    block = _twin(loaded.model.get_submodule(layer.mlp))
    index_K = torch.tensor(kept, device=loaded.device)
    for module in _routed_modules(block, layer):
        if module is not block.get_submodule(_below(layer, layer.experts)):
            _cut(module, index_K, layer.n_experts)
            _set_counts(module, EXPERT_COUNTS, layer.n_experts, len(kept))
    block._modules[_below(layer, layer.experts)] = experts
    return block


def _routed_modules(block: Any, layer: MoeLayer) -> list[Any]:
    """The modules that can hold one row per expert: the MoE block itself, its router with all inside, its experts."""
    router = block.get_submodule(_below(layer, layer.router))
    return [block, *router.modules(), block.get_submodule(_below(layer, layer.experts))]


def _below(layer: MoeLayer, path: str) -> str:
    return path.removeprefix(f"{layer.mlp}.")


def _cut(module: Any, index_K: Tensor, n_experts: int) -> None:
    """Keep the rows ``index_K`` of the module's own tensors that have one per expert (Ernie's are [1, E])."""
    # Outside inference mode, so that a later step may train what is left.
    with torch.inference_mode(False), torch.no_grad():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                axis = _expert_axis(tensor, n_experts)
                if axis is not None:
                    cut = tensor.index_select(axis, index_K)
                    is_parameter = tensors is module._parameters
                    tensors[name] = torch.nn.Parameter(cut, requires_grad=False) if is_parameter else cut
    if getattr(module, "out_features", None) == n_experts:
        module.out_features = len(index_K)


def _expert_axis(tensor: Tensor | None, n_experts: int) -> int | None:
    """The first axis that is not of length one, where it counts experts."""
    if tensor is None:
        return None
    axis = next((i for i, length in enumerate(tensor.shape) if length != 1), None)
    return axis if axis is not None and tensor.shape[axis] == n_experts else None


def _set_counts(module: Any, names: Sequence[str], before: int, after: int) -> None:
    for name in names:
        if vars(module).get(name) == before:
            setattr(module, name, after)


def _twin(module: Any) -> Any:
    """A module whose parts can be replaced without touching the original; tensors are shared."""
    twin = copy.copy(module)
    twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
    twin._modules = {name: None if child is None else _twin(child) for name, child in module._modules.items()}
    return twin


def _matrix(experts: Any, name: str) -> Tensor:
    """[E, out, in] view of a fused weight. Llama-4's, outside the shared contract, multiply from the right."""
    weight: Tensor = getattr(experts, name).data
    return weight.transpose(-2, -1) if getattr(experts, "is_transposed", True) else weight


def _halves(experts: Any, fused_F: Tensor, gated: bool) -> tuple[Tensor | None, Tensor]:
    """Gate and up of a first matrix or bias, cut along its outputs."""
    if not gated:
        return None, fused_F.clone()
    if getattr(experts, "is_concatenated", True):
        gate, up = fused_F.chunk(2)
        return gate.clone(), up.clone()
    return fused_F[::2].clone(), fused_F[1::2].clone()


def _joined(experts: Any, gate: Tensor | None, up: Tensor) -> Tensor:
    """The inverse of ``_halves``."""
    if gate is None:
        return up
    if getattr(experts, "is_concatenated", True):
        return torch.cat([gate, up])
    return torch.stack([gate, up], 1).flatten(0, 1)
