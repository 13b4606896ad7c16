"""The best set of experts to keep, found by trying them all: NAEE (arXiv 2402.14800), the bound for every criterion.

For each layer by itself: F(x) is what its experts put out for the calibration tokens, F_kept(x) the same with a router
that knows only the kept experts, which the family's own router code decides. The loss is ‖F − F_kept‖, the Frobenius
norm over all tokens. Every expert's output on every token is computed once; a set then costs one small routing.

Legend: ``T`` tokens, ``E`` experts, ``K`` top-k slots, ``D`` hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

from core.errors import BadInput
from core.lazy import torch
from core.routing.lens import Routed, routed
from core.routing.merging_profile import expert_output
from core.routing.surgery import restricted_block

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.routing.discover import MoeLayer

MAX_SETS = 500
"""Sets per layer that are tried at most."""


@dataclass(frozen=True)
class Optimum:
    """The best kept set of one layer."""

    kept: tuple[int, ...]
    loss: float
    """‖F − F_kept‖ over the tokens."""
    relative_loss: float
    """The same divided by ‖F‖."""
    n_sets: int


class LayerLoss:
    """What one layer loses on given tokens when only some of its experts are kept."""

    def __init__(self, loaded: LoadedModel, layer: MoeLayer, hidden_TD: Tensor) -> None:
        refuse_shim(layer)
        self._loaded, self._layer, self._hidden_TD = loaded, layer, hidden_TD
        experts = loaded.model.get_submodule(layer.experts)
        self._outputs_TED = torch.stack(
            [expert_output(experts, e, hidden_TD) for e in range(layer.n_experts)], 1
        )
        self._whole_TD = self._mixed(range(layer.n_experts))
        self.norm = float(self._whole_TD.double().norm())

    def of(self, kept: Sequence[int]) -> float:
        """‖F − F_kept‖; 0 where all are kept."""
        return float((self._mixed(kept) - self._whole_TD).double().norm())

    def _mixed(self, kept: Sequence[int]) -> Tensor:
        """[T, D]: the weighted sum of the experts that a router of only ``kept`` chooses."""
        stand_in = _KnownOutputs(self._outputs_TED[:, list(kept)])
        restricted_block(self._loaded, self._layer, kept, stand_in)(self._hidden_TD[None])
        assert stand_in.mixed_TD is not None, f"{self._layer.mlp} did not call its experts"
        return stand_in.mixed_TD


def best_subset(
    loss: LayerLoss, layer: MoeLayer, n_kept: int, protected: frozenset[int] = frozenset()
) -> Optimum:
    """Try every set of ``n_kept`` experts with the protected ones, equally many of every router group.

    The first of equal ones wins. Raises ``BadInput`` where there are too many sets, or none with all protected.
    """
    refuse_too_many(layer, n_kept)
    losses = {kept: loss.of(kept) for kept in kept_sets(layer, n_kept) if protected <= set(kept)}
    if not losses:
        raise BadInput(
            f"layer {layer.layer}: no set of {n_kept} experts holds all protected ones ({sorted(protected)}); remove "
            "fewer or shorten the protect list"
        )
    best = min(losses, key=lambda kept: losses[kept])
    return Optimum(best, losses[best], losses[best] / loss.norm, len(losses))


def kept_sets(layer: MoeLayer, n_kept: int) -> Iterator[tuple[int, ...]]:
    """Every set of ``n_kept`` experts that its router groups allow, in lexicographic order within each group."""
    size, each = layer.n_experts // layer.n_groups, n_kept // layer.n_groups
    groups = [range(first, first + size) for first in range(0, layer.n_experts, size)]
    for parts in product(*(combinations(group, each) for group in groups)):
        yield tuple(expert for part in parts for expert in part)


def n_sets(layer: MoeLayer, n_kept: int) -> int:
    """How many sets there are: C(E, r), or with groups C(E/G, r/G)^G."""
    size, each = layer.n_experts // layer.n_groups, n_kept // layer.n_groups
    return int(math.comb(size, each) ** layer.n_groups)


def refuse_too_many(layer: MoeLayer, n_kept: int) -> None:
    """Raise ``BadInput`` where there are more than ``MAX_SETS`` sets."""
    found = n_sets(layer, n_kept)
    if found > MAX_SETS:
        raise BadInput(
            f"naee tries every set of {n_kept} of {layer.n_experts} experts: {found:,} per layer, more than {MAX_SETS}; "
            "remove fewer experts, or choose reap, man or aimer, which score single experts"
        )


def refuse_shim(layer: MoeLayer) -> None:
    """Raise ``BadInput`` for a family whose experts are not called with the decision."""
    if layer.shim:
        raise BadInput(
            f"{layer.experts} is not called with chosen experts and weights, so kept sets cannot be tried; choose reap"
        )


def layer_inputs(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], max_tokens: int
) -> Mapping[int, Tensor]:
    """Layer → hidden states [T, D] that its experts read on the first ``max_tokens`` tokens; hold ``loaded.lock``."""
    found: dict[int, list[Tensor]] = {}

    def keep(at: Routed) -> None:
        found.setdefault(at.layer, []).append(at.hidden_TD[at.valid_T].clone())

    left = max_tokens
    for ids in texts:
        if left <= 0:
            break
        with torch.inference_mode(), routed(loaded, keep):
            loaded.model(input_ids=torch.tensor([list(ids)[:left]], device=loaded.device), use_cache=False)
        left -= len(ids)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


class _KnownOutputs:
    """Stands where the experts module stood: mixes outputs that are known instead of computing them."""

    def __init__(self, outputs_TED: Tensor) -> None:
        self._outputs_TED = outputs_TED
        self.mixed_TD: Tensor | None = None

    def __call__(self, hidden_TD: Tensor, *decision: Any, **named: Any) -> Tensor:
        experts_TK, weights_TK = (*decision, *named.values())
        chosen_TKD = self._outputs_TED.take_along_dim(experts_TK[..., None], 1)
        self.mixed_TD = (weights_TK[..., None] * chosen_TKD).sum(1)
        return self.mixed_TD
