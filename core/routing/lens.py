"""See, and if wanted change, what every mixture-of-experts layer decides while a model runs.

The decision is read where it is used: from the arguments (hidden, chosen experts, routing weights) of the experts
module. It is never computed again from the router's logits, so it is right for every routing rule.

* Watching alone is a hook before the experts module; the model's own implementation computes the output.
* Changes, and anything that needs an expert's output by itself, go through ``IMPLEMENTATION``, an experts function of
  ours in transformers' ``ALL_EXPERTS_FUNCTIONS``. It edits the arguments and calls the implementation the model had.
  For single outputs it asks that one for each (token, slot) pair as a token of its own with weight 1, so that gates,
  biases, transposed or interleaved weights and norms after the experts are always the family's own code. The weighted
  sum is then taken as ``grouped_mm`` takes it, to the last bit.

What is active is kept in a ContextVar: another thread that runs the same model sees no change and is not observed.
This module knows no statistics and no probe.

Legend: ``B`` batch, ``P`` positions, ``T`` rows of one call (B · P, padding included), ``K`` slots per token,
``E`` experts, ``D`` hidden size, ``S`` (token, slot) pairs (T · K).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from core.capture import HookDidNotFire, module_at
from core.errors import BadInput, SlimscopeError
from core.lazy import torch
from core.routing.discover import MoeLayer, moe_layers

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.numerics.schemes import IntegerScheme

IMPLEMENTATION = "slimscope"
"""Name of our experts function among transformers' experts implementations."""
Decision = tuple["Tensor", "Tensor"]
"""Chosen experts [T, K] and their routing weights [T, K]."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Routed:
    """What one MoE layer did in one forward call; a row for every position of the call, row b · P + p."""

    layer: int
    """Index of its block."""
    experts_TK: Tensor
    """int64; the expert that computed each slot, -1 in padding and in slots that reach no expert."""
    weights_TK: Tensor
    """float32; the routing weight that was applied, 0 where the expert is -1 or ablated."""
    hidden_TD: Tensor
    """What the experts read."""
    valid_T: Tensor
    """bool; False in padding."""
    logits_TE: Tensor | None = None
    """The router's own logits, where its output has them (log-probabilities where it gives probabilities)."""
    norms_TK: Tensor | None = None
    """float32 ‖f_e(x)‖₂ of each slot's expert before weighting, 0 where the expert is -1; None unless asked for."""
    outputs_TKD: Tensor | None = None
    """f_e(x) of each slot before weighting, 0 where the expert is -1; None unless asked for."""


@dataclass(frozen=True)
class Change:
    """What the layers do differently; keys are block indices. Applied in the order of the fields."""

    top_k: int | Mapping[int, int] | None = None
    """Experts per token; the router itself chooses and normalizes as it does."""
    replay: Mapping[int, Decision] = field(default_factory=dict)
    """A decision in place of the router's, rows as in ``Routed``; padding keeps the router's own."""
    edit: Callable[[Routed], Decision | None] | None = None
    """Called with every layer's decision; what it returns replaces it."""
    expert_map: Mapping[int, Tensor] = field(default_factory=dict)
    """[E]: the expert that computes in place of each expert."""
    ablate: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """These experts put out zero; the weights of the others stay as they are."""
    grids: Mapping[int, Mapping[int, IntegerScheme]] = field(default_factory=dict)
    """Expert → the integer grid its weights are rounded to. Holds a copy of the layer's expert weights."""

    @property
    def layers(self) -> frozenset[int]:
        """Every block index that is named."""
        named = self.top_k if isinstance(self.top_k, Mapping) else {}
        return frozenset().union(named, self.replay, self.expert_map, self.ablate, self.grids)

    @property
    def needs_implementation(self) -> bool:
        """Whether more changes than what the router itself decides."""
        return bool(self.replay or self.edit or self.expert_map or self.ablate or self.grids)


NOTHING = Change()
Observe = Callable[[Routed], None]


@dataclass(eq=False)
class _Layer:
    """One MoE layer inside one ``routed`` block."""

    at: MoeLayer
    experts: Any
    router: Any
    mlp: Any
    weights: dict[str, Any] = field(default_factory=dict)
    """Parameters of the experts module that stand in for its own."""
    logits_TE: Tensor | None = None
    """Of the call that runs; handed from the router's hook to the experts."""
    gives_probabilities: bool | None = None
    fired: bool = False


@dataclass(frozen=True, eq=False)
class _Lens:
    """What one ``routed`` block wants."""

    layers: tuple[_Layer, ...]
    observe: Observe | None
    change: Change
    norms: bool
    outputs: bool
    mask_BP: Tensor | None

    @property
    def replaces_experts(self) -> bool:
        return self.change.needs_implementation or self.norms or self.outputs


_ACTIVE: ContextVar[Mapping[int, tuple[_Lens, _Layer]]] = ContextVar("routed", default={})  # noqa: B039 (never mutated)
_OWN: WeakKeyDictionary[Any, Callable[..., Tensor]] = WeakKeyDictionary()
"""Experts module → the implementation it had before ours."""


@contextmanager
def routed(
    loaded: LoadedModel,
    observe: Observe | None = None,
    *,
    change: Change = NOTHING,
    norms: bool = False,
    outputs: bool = False,
    mask_BP: Tensor | None = None,
) -> Iterator[None]:
    """Let ``observe`` see every MoE layer's decision in the forward passes of this thread, and apply ``change``.

    ``observe`` is called once per layer and forward call, in the order of the layers, with what was really used. Its
    tensors are the model's own where nothing had to be masked: copy what you keep, and change nothing in place.
    ``norms`` and ``outputs`` also give what each expert put out by itself; ``outputs`` costs T · K · D numbers a layer.
    ``mask_BP`` is 1 for tokens and 0 for padding; a cached decoding step takes its last columns.

    Hold ``loaded.lock`` around the block and run without gradients. Whatever happens, the model is left as it was.
    Raises ``BadInput`` for a dense model and for changes that do not fit it, ``HookDidNotFire`` when the block ends
    without error and a layer never ran.
    """
    lens = _Lens(_layers(loaded), observe, change, norms, outputs, mask_BP)
    _check(lens)
    if any(id(layer.experts) in _ACTIVE.get() for layer in lens.layers):
        raise SlimscopeError(
            "this model is watched already; give one routed() block both the observer and the change"
        )
    with ExitStack() as undo:
        for layer in lens.layers:
            _set_top_k(layer, change, undo)
            if observe is not None or change.edit is not None:
                undo.callback(layer.router.register_forward_hook(_logits_reader(layer)).remove)
        if lens.replaces_experts:
            _replace_experts(loaded.model, lens, undo)
        else:
            for layer in lens.layers:
                hook = layer.experts.register_forward_pre_hook(_watcher(lens, layer), with_kwargs=True)
                undo.callback(hook.remove)
        token = _ACTIVE.set({**_ACTIVE.get(), **{id(layer.experts): (lens, layer) for layer in lens.layers}})
        undo.callback(_ACTIVE.reset, token)
        yield
    silent = [layer.at.experts for layer in lens.layers if not layer.fired]
    if silent:
        raise HookDidNotFire(
            f"{silent[0]} was watched but never ran ({len(silent)} of {len(lens.layers)} MoE layers silent); "
            "run a forward pass inside the block, and check that no fused kernel replaces this module"
        )


def _layers(loaded: LoadedModel) -> tuple[_Layer, ...]:
    """The model's MoE layers, in order; ``BadInput`` where there are none."""
    found = moe_layers(loaded.model)
    if not found:
        raise BadInput(
            f"{loaded.ref} is dense: it has no experts to watch; choose a MoE model such as demo:moe"
        )
    at = functools.partial(module_at, loaded.model)
    return tuple(_Layer(layer, at(layer.experts), at(layer.router), at(layer.mlp)) for layer in found)


def _check(lens: _Lens) -> None:
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
        top_k = _of_layer(change.top_k, index)
        if top_k is not None and not 1 <= top_k <= layer.at.n_experts:
            raise BadInput(
                f"block {index} can route to 1 to {layer.at.n_experts} experts per token, not {top_k}"
            )
        if lens.replaces_experts and not hasattr(layer.experts, "_apply_gate"):
            raise BadInput(
                f"{layer.at.experts} ({type(layer.experts).__name__}) does not use transformers' experts interface: "
                "its routing can be watched, but not changed, and single experts' outputs cannot be read"
            )


def _of_layer(value: Value | Mapping[int, Value] | None, index: int) -> Value | None:
    return value.get(index) if isinstance(value, Mapping) else value


def _set_top_k(layer: _Layer, change: Change, undo: ExitStack) -> None:
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


def _replace_experts(model: Any, lens: _Lens, undo: ExitStack) -> None:
    """Make ``IMPLEMENTATION`` the model's experts function, remembering what each experts module had."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    for layer in lens.layers:
        # functools.wraps keeps the class's own forward, which is what "eager" means.
        eager = type(layer.experts).forward.__wrapped__
        own = ALL_EXPERTS_FUNCTIONS.get_interface(layer.experts.config._experts_implementation, eager)
        _OWN[layer.experts] = own
        undo.callback(_OWN.pop, layer.experts)
        layer.weights = _rounded(layer, lens.change.grids.get(layer.at.layer, {}))
    undo.callback(model.set_experts_implementation, model.get_experts_implementation())
    model.set_experts_implementation(IMPLEMENTATION)
    for layer in lens.layers:
        assert layer.experts.config._experts_implementation == IMPLEMENTATION, (
            f"{layer.at.experts} kept its implementation"
        )


def _rounded(layer: _Layer, grids: Mapping[int, IntegerScheme]) -> dict[str, Any]:
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


def _logits_reader(layer: _Layer) -> Callable[..., None]:
    """A hook behind the router that keeps its logits for the experts module, which runs next."""

    def read(module: Any, args: Any, output: Any) -> None:
        if id(layer.experts) not in _ACTIVE.get():
            return
        parts = output if isinstance(output, tuple) else (output,)
        wanted = [part for part in parts if torch.is_tensor(part) and part.is_floating_point()]
        wanted = [part for part in wanted if part.shape[-1] == layer.at.n_experts]
        layer.logits_TE = _as_logits(layer, wanted[0].detach().flatten(0, -2)) if wanted else None

    return read


def _as_logits(layer: _Layer, scores_TE: Tensor) -> Tensor:
    """A few routers put out probabilities under the name of logits; the first call tells which."""
    if layer.gives_probabilities is None:
        sums_T = scores_TE.float().sum(-1)
        layer.gives_probabilities = bool((scores_TE >= 0).all() and ((sums_T - 1).abs() < 1e-2).all())
    return scores_TE.log() if layer.gives_probabilities else scores_TE


def _watcher(lens: _Lens, layer: _Layer) -> Callable[..., None]:
    """A hook before the experts module that shows its arguments to the observer."""

    def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if id(module) not in _ACTIVE.get():
            return
        layer.fired = True
        if lens.observe is not None:
            hidden_TD, experts_TK, weights_TK = (*args, *kwargs.values())
            lens.observe(_seen(lens, layer, hidden_TD, (experts_TK, weights_TK)))

    return watch


def _experts_forward(module: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """``IMPLEMENTATION``: the changed decision, computed by the implementation the module had before."""
    hidden_TD, experts_TK, weights_TK = (*args, *kwargs.values())
    own = _OWN[module]
    active = _ACTIVE.get().get(id(module))
    if active is None:
        return own(module, hidden_TD, experts_TK, weights_TK)
    lens, layer = active
    layer.fired = True
    seen = _seen(lens, layer, hidden_TD, (experts_TK, weights_TK))
    used = _decide(lens.change, seen, (experts_TK, weights_TK))
    # A slot that reaches no expert is computed by expert 0 with weight 0.
    reached_SK = (used[0] >= 0) & (used[0] < layer.at.n_experts)
    experts_TK = used[0].where(reached_SK, 0)
    weights_TK = used[1].where(reached_SK, 0).to(weights_TK.dtype)
    with _standing_in(module, layer.weights):
        if not (lens.norms or lens.outputs):
            outputs_SD, result_TD = None, own(module, hidden_TD, experts_TK, weights_TK)
        else:
            outputs_SD, result_TD = _one_by_one(own, module, hidden_TD, experts_TK, weights_TK)
    if lens.observe is not None:
        seen = _seen(lens, layer, hidden_TD, (used[0], weights_TK))
        lens.observe(seen if outputs_SD is None else _with_outputs(lens, seen, outputs_SD))
    return result_TD


def _one_by_one(
    own: Callable[..., Tensor], module: Any, hidden_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Every slot's unweighted output [S, D], and the layer's output [T, D] summed from them."""
    n_slots = experts_TK.shape[1]
    hidden_SD = hidden_TD.repeat_interleave(n_slots, dim=0)
    ones_S1 = hidden_TD.new_ones(len(hidden_SD), 1)
    outputs_SD = own(module, hidden_SD, experts_TK.reshape(-1, 1), ones_S1)
    weighted_SD = outputs_SD * weights_TK.reshape(-1, 1)
    return outputs_SD, weighted_SD.view(-1, n_slots, hidden_TD.shape[1]).sum(dim=1).to(hidden_TD.dtype)


def _decide(change: Change, seen: Routed, decided: Decision) -> Decision:
    """The decision after replay, edit, expert map and ablation."""
    experts_TK, weights_TK = decided
    if seen.layer in change.replay:
        experts_TK, weights_TK = _replayed(change.replay[seen.layer], seen, decided)
    if change.edit is not None:
        edited = change.edit(_masked(seen, experts_TK, weights_TK))
        if edited is not None:
            experts_TK, weights_TK = edited
    if seen.layer in change.expert_map:
        new_E = change.expert_map[seen.layer].to(experts_TK.device)
        reached_TK = (experts_TK >= 0) & (experts_TK < len(new_E))
        experts_TK = new_E[experts_TK.where(reached_TK, 0)].where(reached_TK, -1)
    if seen.layer in change.ablate:
        silenced = torch.tensor(sorted(change.ablate[seen.layer]), device=experts_TK.device)
        weights_TK = weights_TK.masked_fill(torch.isin(experts_TK, silenced), 0)
    return experts_TK, weights_TK


def _replayed(wanted: Decision, seen: Routed, decided: Decision) -> Decision:
    experts_TK, weights_TK = (part.to(seen.hidden_TD.device) for part in wanted)
    if len(experts_TK) != len(seen.valid_T) or experts_TK.shape != weights_TK.shape:
        raise BadInput(
            f"block {seen.layer} is to replay {tuple(experts_TK.shape)} experts with {tuple(weights_TK.shape)} weights, "
            f"but this call has {len(seen.valid_T)} rows; replay a decision captured on the same tokens"
        )
    if bool(seen.valid_T.all()):
        return experts_TK, weights_TK
    if experts_TK.shape != decided[0].shape:
        raise BadInput("with padding, a replayed decision must have as many slots as the router's own")
    valid_T1 = seen.valid_T.unsqueeze(1)
    return experts_TK.where(valid_T1, decided[0]), weights_TK.to(decided[1].dtype).where(valid_T1, decided[1])


def _seen(lens: _Lens, layer: _Layer, hidden_TD: Tensor, decided: Decision) -> Routed:
    """The record of one call, padding and sentinel slots masked."""
    rows = torch.ones(len(hidden_TD), dtype=torch.bool, device=hidden_TD.device)
    if lens.mask_BP is not None:
        positions = len(hidden_TD) // len(lens.mask_BP)
        rows = lens.mask_BP[:, -positions:].reshape(-1).to(hidden_TD.device, torch.bool)
        assert len(rows) == len(hidden_TD), f"mask {tuple(lens.mask_BP.shape)} for {len(hidden_TD)} rows"
    raw = Routed(layer.at.layer, *decided, hidden_TD=hidden_TD, valid_T=rows, logits_TE=layer.logits_TE)
    return _masked(raw, *decided, n_experts=layer.at.n_experts)


def _masked(seen: Routed, experts_TK: Tensor, weights_TK: Tensor, *, n_experts: int | None = None) -> Routed:
    """``seen`` with another decision, as a reader wants it: int64 and float32, -1 and 0 where nothing is computed."""
    gone_TK = ~seen.valid_T.unsqueeze(1) | (experts_TK < 0)
    if n_experts is not None:
        gone_TK = gone_TK | (experts_TK >= n_experts)
    experts_TK, weights_TK = experts_TK.long(), weights_TK.float()
    if bool(gone_TK.any()):
        experts_TK, weights_TK = experts_TK.masked_fill(gone_TK, -1), weights_TK.masked_fill(gone_TK, 0)
    return replace(seen, experts_TK=experts_TK, weights_TK=weights_TK)


def _with_outputs(lens: _Lens, seen: Routed, outputs_SD: Tensor) -> Routed:
    gone_TK1 = (seen.experts_TK < 0).unsqueeze(-1)
    outputs_TKD = outputs_SD.view(*seen.experts_TK.shape, -1)
    if bool(gone_TK1.any()):
        outputs_TKD = outputs_TKD.masked_fill(gone_TK1, 0)
    return replace(
        seen,
        norms_TK=torch.linalg.vector_norm(outputs_TKD, dim=-1, dtype=torch.float32) if lens.norms else None,
        outputs_TKD=outputs_TKD if lens.outputs else None,
    )


@contextmanager
def _standing_in(module: Any, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Let other parameters stand in for the module's own while it computes."""
    own = {name: module._parameters[name] for name in parameters}
    module._parameters.update(parameters)
    try:
        yield
    finally:
        module._parameters.update(own)
