"""The experts function of the routing lens, and what one call of an experts module looks like to an observer.

``experts_forward`` is registered in transformers' ``ALL_EXPERTS_FUNCTIONS``. It edits the arguments and calls the
implementation the model had. For single experts' outputs it asks that one for each (token, slot) pair as a token of
its own with weight 1, so that gates, biases, transposed or interleaved weights and norms after the experts are always
the family's own code. The weighted sum is then taken as ``grouped_mm`` takes it, to the last bit.

Which model is watched is known by ``lens.py``; what is active now is kept here, in a ContextVar.

Legend: ``B`` batch, ``P`` positions, ``T`` rows of one call (B · P, padding included), ``K`` slots per token,
``E`` experts, ``D`` hidden size, ``S`` (token, slot) pairs (T · K).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from core.errors import BadInput
from core.lazy import torch
from core.routing._records import Change, Decision, Observe, Routed
from core.routing.discover import MoeLayer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Layer:
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
class Lens:
    """What one ``routed`` block wants."""

    layers: tuple[Layer, ...]
    observe: Observe | None
    change: Change
    norms: bool
    outputs: bool
    mask_BP: Tensor | None

    @property
    def replaces_experts(self) -> bool:
        return self.change.needs_implementation or self.norms or self.outputs


ACTIVE: ContextVar[Mapping[int, tuple[Lens, Layer]]] = ContextVar("routed", default={})  # noqa: B039 (never mutated)
OWN: WeakKeyDictionary[Any, Callable[..., Tensor]] = WeakKeyDictionary()
"""Experts module → the implementation it had before ours."""


def experts_forward(module: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """``IMPLEMENTATION``: the changed decision, computed by the implementation the module had before."""
    hidden_TD, experts_TK, weights_TK = (*args, *kwargs.values())
    own = OWN[module]
    active = ACTIVE.get().get(id(module))
    if active is None:
        return own(module, hidden_TD, experts_TK, weights_TK)
    lens, layer = active
    layer.fired = True
    seen = seen_by(lens, layer, hidden_TD, (experts_TK, weights_TK))
    used = _decide(lens.change, layer, seen, (experts_TK, weights_TK))
    # A slot that reaches no expert is computed by expert 0 with weight 0.
    reached_TK = (used[0] >= 0) & (used[0] < layer.at.n_experts)
    experts_TK = used[0].where(reached_TK, 0)
    weights_TK = used[1].where(reached_TK, 0).to(weights_TK.dtype)
    with _standing_in(module, layer.weights):
        if not (lens.norms or lens.outputs):
            outputs_SD, result_TD = None, own(module, hidden_TD, experts_TK, weights_TK)
        else:
            outputs_SD, result_TD = _one_by_one(own, module, hidden_TD, experts_TK, weights_TK)
    if lens.observe is not None:
        seen = seen_by(lens, layer, hidden_TD, (used[0], weights_TK))
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


def _decide(change: Change, layer: Layer, seen: Routed, decided: Decision) -> Decision:
    """The decision after replay, edit, expert map and ablation."""
    experts_TK, weights_TK = own = decided
    if seen.layer in change.replay:
        experts_TK, weights_TK = _forced(change.replay[seen.layer], seen, own)
    if change.edit is not None:
        edited = change.edit(_masked(seen, experts_TK, weights_TK, n_experts=layer.at.n_experts))
        if edited is not None:
            experts_TK, weights_TK = _forced(edited, seen, own)
    if seen.layer in change.expert_map:
        new_E = change.expert_map[seen.layer].to(experts_TK.device)
        reached_TK = (experts_TK >= 0) & (experts_TK < len(new_E))
        experts_TK = new_E[experts_TK.where(reached_TK, 0)].where(reached_TK, -1)
    if seen.layer in change.ablate:
        silenced = torch.tensor(sorted(change.ablate[seen.layer]), device=experts_TK.device)
        weights_TK = weights_TK.masked_fill(torch.isin(experts_TK, silenced), 0)
    return experts_TK, weights_TK


def _forced(wanted: Decision, seen: Routed, own: Decision) -> Decision:
    """A decision from outside, in every row but padding, which keeps the router's own."""
    experts_TK, weights_TK = (part.to(seen.hidden_TD.device) for part in wanted)
    if len(experts_TK) != len(seen.valid_T) or experts_TK.shape != weights_TK.shape:
        raise BadInput(
            f"block {seen.layer} is given {tuple(experts_TK.shape)} experts with {tuple(weights_TK.shape)} weights, "
            f"but this call has {len(seen.valid_T)} rows; give one row for each, as captured on the same tokens"
        )
    if bool(seen.valid_T.all()):
        return experts_TK, weights_TK
    if experts_TK.shape != own[0].shape:
        raise BadInput(
            f"block {seen.layer} is given {experts_TK.shape[1]} slots where the router has {own[0].shape[1]}; with "
            "padding, whose rows stay the router's, both must be equal"
        )
    valid_T1 = seen.valid_T.unsqueeze(1)
    return experts_TK.where(valid_T1, own[0]), weights_TK.to(own[1].dtype).where(valid_T1, own[1])


def seen_by(lens: Lens, layer: Layer, hidden_TD: Tensor, decided: Decision) -> Routed:
    """The record of one call, padding and sentinel slots masked."""
    valid_T = _rows(lens, len(hidden_TD), hidden_TD.device)
    raw = Routed(layer.at.layer, *decided, hidden_TD=hidden_TD, valid_T=valid_T, logits_TE=layer.logits_TE)
    return _masked(raw, *decided, n_experts=layer.at.n_experts)


def _rows(lens: Lens, n_rows: int, device: Any) -> Tensor:
    """Which rows of a call are tokens [T]; a decoding step's are the last columns of the mask."""
    if lens.mask_BP is None:
        return torch.ones(n_rows, dtype=torch.bool, device=device)
    positions = n_rows // len(lens.mask_BP)
    valid_T = lens.mask_BP[:, -positions:].reshape(-1).to(device, torch.bool)
    assert len(valid_T) == n_rows, f"mask {tuple(lens.mask_BP.shape)} for {n_rows} rows"
    return valid_T


def _masked(seen: Routed, experts_TK: Tensor, weights_TK: Tensor, *, n_experts: int) -> Routed:
    """``seen`` with another decision, as a reader wants it: int64 and float32, -1 and 0 where nothing is computed."""
    gone_TK = ~seen.valid_T.unsqueeze(1) | (experts_TK < 0) | (experts_TK >= n_experts)
    experts_TK, weights_TK = experts_TK.long(), weights_TK.float()
    if bool(gone_TK.any()):
        experts_TK, weights_TK = experts_TK.masked_fill(gone_TK, -1), weights_TK.masked_fill(gone_TK, 0)
    return replace(seen, experts_TK=experts_TK, weights_TK=weights_TK)


def _with_outputs(lens: Lens, seen: Routed, outputs_SD: Tensor) -> Routed:
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
