"""See, and if wanted change, what every mixture-of-experts layer decides while a model runs.

The decision is read where it is used: from the arguments (hidden, chosen experts, routing weights) of the experts
module. It is never computed again from the router's logits, so it is right for every routing rule.

* Watching alone is a hook before the experts module; the model's own implementation computes the output.
* Changes, and anything that needs an expert's output by itself, go through ``IMPLEMENTATION``, an experts function of
  ours in transformers' ``ALL_EXPERTS_FUNCTIONS`` (``_experts.py``), for as long as the block runs.

What is active is kept in a ContextVar: another thread that runs the same model sees no change and is not observed.
This module knows no statistics and no probe. Legend: ``_experts.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from core.capture import HookDidNotFire, module_at
from core.errors import BadInput, SlimscopeError
from core.lazy import torch
from core.routing._experts import ACTIVE, OWN, Layer, Lens, experts_forward, seen_by
from core.routing._records import NOTHING, Change, Decision, Observe, Routed
from core.routing._shims import scaled_input_decision
from core.routing.discover import MoeLayer, moe_layers

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.numerics.schemes import IntegerScheme

__all__ = ["IMPLEMENTATION", "NOTHING", "Change", "Decision", "Observe", "Routed", "layers_of", "routed"]

IMPLEMENTATION = "slimscope"
"""Name of our experts function among transformers' experts implementations."""
Value = TypeVar("Value")


def layers_of(loaded: LoadedModel) -> tuple[MoeLayer, ...]:
    """The model's MoE layers, in order; ``BadInput`` for a dense model."""
    found = moe_layers(loaded.model)
    if not found:
        raise BadInput(
            f"{loaded.ref} is dense: it has no experts to watch; choose a MoE model such as demo:moe"
        )
    return found


@contextmanager
def routed(
    loaded: LoadedModel,
    observe: Observe | None = None,
    *,
    change: Change = NOTHING,
    norms: bool = False,
    outputs: bool = False,
    mask_BP: Tensor | None = None,
    first_layer: int = 0,
) -> Iterator[None]:
    """Let ``observe`` see every MoE layer's decision in the forward passes of this thread, and apply ``change``.

    ``observe`` is called once per layer and forward call, in the order of the layers, with what was really used. Its
    tensors are the model's own where nothing had to be masked: copy what you keep, and change nothing in place.
    ``norms`` and ``outputs`` also give what each expert put out by itself; ``outputs`` costs T · K · D numbers a layer.
    ``mask_BP`` is 1 for tokens and 0 for padding; a cached decoding step takes its last columns. Blocks before
    ``first_layer`` are left alone and need not run (``prefix.py``).

    Hold ``loaded.lock`` around the block and run without gradients. Whatever happens, the model is left as it was.
    Raises ``BadInput`` for a dense model and for changes that do not fit it, ``HookDidNotFire`` when the block ends
    without error and a layer never ran.
    """
    at = functools.partial(module_at, loaded.model)
    layers = tuple(
        Layer(found, at(found.experts), at(found.router), at(found.mlp))
        for found in layers_of(loaded)
        if found.layer >= first_layer
    )
    lens = Lens(layers, observe, change, norms, outputs, mask_BP)
    _check(lens)
    if any(id(layer.experts) in ACTIVE.get() for layer in lens.layers):
        raise SlimscopeError(
            "this model is watched already; give one routed() block both the observer and the change"
        )
    with ExitStack() as undo:
        for layer in lens.layers:
            _set_top_k(layer, change, undo)
            if not layer.at.shim and (observe is not None or change.edit is not None):
                undo.callback(layer.router.register_forward_hook(_logits_reader(layer)).remove)
        if lens.replaces_experts:
            _replace_experts(loaded.model, lens, undo)
        else:
            for layer in lens.layers:
                if layer.at.shim:
                    hook = layer.router.register_forward_hook(_shim(lens, layer))
                else:
                    hook = layer.experts.register_forward_pre_hook(_watcher(lens, layer), with_kwargs=True)
                undo.callback(hook.remove)
        token = ACTIVE.set({**ACTIVE.get(), **{id(layer.experts): (lens, layer) for layer in lens.layers}})
        undo.callback(ACTIVE.reset, token)
        yield
    silent = [layer.at.experts for layer in lens.layers if not layer.fired]
    if silent:
        raise HookDidNotFire(
            f"{silent[0]} was watched but never ran ({len(silent)} of {len(lens.layers)} MoE layers silent); "
            "run a forward pass inside the block, and check that no fused kernel replaces this module"
        )


def _check(lens: Lens) -> None:
    """Refuse what cannot be done to this model before anything is touched."""
    layers = {layer.at.layer: layer for layer in lens.layers}
    change = lens.change
    unknown = sorted(change.layers - set(layers))
    if unknown:
        raise BadInput(f"block {unknown[0]} is no MoE layer of this model; those are {sorted(layers)}")
    for index, layer in layers.items():
        named = [*change.ablate.get(index, ()), *change.grids.get(index, ())]
        if index in change.expert_map:
            new_E = change.expert_map[index]
            if new_E.shape != (layer.at.n_experts,):
                raise BadInput(
                    f"the expert map of block {index} has {tuple(new_E.shape)}, not {layer.at.n_experts} entries"
                )
            named += new_E.tolist()
        wrong = [expert for expert in named if not 0 <= expert < layer.at.n_experts]
        if wrong:
            raise BadInput(f"block {index} has experts 0 to {layer.at.n_experts - 1}, not {wrong[0]}")
        _check_top_k(layer.at, _of_layer(change.top_k, index))
        if lens.replaces_experts and not hasattr(layer.experts, "_apply_gate"):
            raise BadInput(
                f"{layer.at.experts} ({type(layer.experts).__name__}) does not use transformers' experts interface: "
                "its routing can be watched, but not changed, and single experts' outputs cannot be read"
            )


def _check_top_k(layer: MoeLayer, top_k: int | None) -> None:
    """A token can choose among the experts of its best groups only, where routing knows groups."""
    reachable = layer.n_experts // layer.n_groups * layer.top_groups
    if top_k is not None and not 1 <= top_k <= reachable:
        among = "" if reachable == layer.n_experts else f" (of its {layer.top_groups} best groups)"
        raise BadInput(
            f"block {layer.layer} can route to 1 to {reachable} experts{among} per token, not {top_k}"
        )


def _of_layer(value: Value | Mapping[int, Value] | None, index: int) -> Value | None:
    return value.get(index) if isinstance(value, Mapping) else value


def _set_top_k(layer: Layer, change: Change, undo: ExitStack) -> None:
    """``top_k`` of router and block while the block runs; it is a plain attribute in every family that has one."""
    top_k = _of_layer(change.top_k, layer.at.layer)
    if top_k is None:
        return
    holders = [
        module for module in (layer.router, layer.mlp) if isinstance(getattr(module, "top_k", None), int)
    ]
    if not holders:
        raise BadInput(f"{type(layer.router).__name__} has no top_k to change; this family's is fixed")
    for module in holders:
        undo.callback(setattr, module, "top_k", module.top_k)
        module.top_k = top_k


def _replace_experts(model: Any, lens: Lens, undo: ExitStack) -> None:
    """Make ``IMPLEMENTATION`` the model's experts function, remembering what each experts module had."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    for layer in lens.layers:
        # functools.wraps keeps the class's own forward, which is what "eager" means.
        eager = type(layer.experts).forward.__wrapped__
        own = ALL_EXPERTS_FUNCTIONS.get_interface(layer.experts.config._experts_implementation, eager)
        OWN[layer.experts] = own
        undo.callback(OWN.pop, layer.experts)
        layer.weights = rounded(layer, lens.change.grids.get(layer.at.layer, {}))
    undo.callback(model.set_experts_implementation, model.get_experts_implementation())
    model.set_experts_implementation(IMPLEMENTATION)
    for layer in lens.layers:
        assert layer.experts.config._experts_implementation == IMPLEMENTATION, (
            f"{layer.at.experts} kept its implementation"
        )


def rounded(layer: Layer, grids: Mapping[int, IntegerScheme]) -> dict[str, Any]:
    """The experts' matrices with some experts' weights rounded to their grids; rows are what one output reads."""
    from core.numerics.integer import quantize

    if not grids:
        return {}
    rounded = {}
    for name, parameter in layer.experts.named_parameters(recurse=False):
        if parameter.ndim != 3:
            continue
        weights = parameter.detach().clone()
        rows_EOI = weights.mT if layer.experts.is_transposed else weights
        for expert, scheme in grids.items():
            columns = rows_EOI.shape[-1]
            if scheme.group_size is not None and columns % scheme.group_size:
                raise BadInput(
                    f"group size {scheme.group_size} does not divide the {columns} columns of {name}"
                )
            rows_EOI[expert] = quantize(rows_EOI[expert], scheme).dequantize().to(weights.dtype)
        rounded[name] = torch.nn.Parameter(weights, requires_grad=False)
    return rounded


def _logits_reader(layer: Layer) -> Callable[..., None]:
    """A hook behind the router that keeps its logits for the experts module, which runs next."""

    def read(module: Any, args: Any, output: Any) -> None:
        if id(layer.experts) not in ACTIVE.get():
            return
        parts = output if isinstance(output, tuple) else (output,)
        wanted = [part for part in parts if torch.is_tensor(part) and part.is_floating_point()]
        wanted = [part for part in wanted if part.shape[-1] == layer.at.n_experts]
        layer.logits_TE = _as_logits(layer, wanted[0].detach().flatten(0, -2)) if wanted else None

    return read


def _as_logits(layer: Layer, scores_TE: Tensor) -> Tensor:
    """A few routers put out probabilities under the name of logits; the first call tells which."""
    if layer.gives_probabilities is None:
        sums_T = scores_TE.float().sum(-1)
        layer.gives_probabilities = bool((scores_TE >= 0).all() and ((sums_T - 1).abs() < 1e-2).all())
    return scores_TE.log() if layer.gives_probabilities else scores_TE


def _watcher(lens: Lens, layer: Layer) -> Callable[..., None]:
    """A hook before the experts module that shows its arguments to the observer."""

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in ACTIVE.get():
            return
        layer.fired = True
        if lens.observe is not None:
            hidden_TD, experts_TK, weights_TK = (*args, *kwargs.values())
            lens.observe(seen_by(lens, layer, hidden_TD, (experts_TK, weights_TK)))

    return watch


def _shim(lens: Lens, layer: Layer) -> Callable[..., None]:
    """A hook behind the router of experts that are not called with the decision; they read hidden · weight."""

    def watch(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if id(layer.experts) not in ACTIVE.get():
            return
        layer.fired = True
        if lens.observe is not None:
            experts_TK, weights_TK, layer.logits_TE = scaled_input_decision(output)
            lens.observe(seen_by(lens, layer, args[0], (experts_TK, weights_TK)))

    return watch
