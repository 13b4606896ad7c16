"""One token's routing edited: the untouched run, another expert in a slot, another number of experts.

Legend: T tokens up to the one edited, which is the last; K slots, W slots after an edit, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import CannotMeasure
from core.lazy import torch
from core.routing.lens import Change, Decision, Routed, routed
from core.routing.prefix import Returned, blocks_returning, record_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

NOBODY = -1
"""In place of an expert's number: the slot is left empty."""


@dataclass(frozen=True)
class Whole:
    """The untouched run up to the token."""

    ids_T: Tensor
    logits_V: Tensor
    decisions: Mapping[int, Decision]
    router_logits: Mapping[int, Tensor | None]
    """The token's own, per layer [E]; None where the router does not tell."""
    returned: Returned

    @classmethod
    def of(cls, loaded: LoadedModel, ids_T: Tensor) -> Whole:
        decisions: dict[int, Decision] = {}
        scores: dict[int, Tensor | None] = {}

        def keep(seen: Routed) -> None:
            decisions[seen.layer] = seen.experts_TK.clone(), seen.weights_TK.clone()
            scores[seen.layer] = None if seen.logits_TE is None else seen.logits_TE[-1].float()

        with record_blocks(loaded) as returned, routed(loaded, keep):
            logits_V = _last_logits(loaded, ids_T)
        return cls(ids_T, logits_V, decisions, scores, returned)


def _last_logits(loaded: LoadedModel, ids_T: Tensor) -> Tensor:
    logits_V: Tensor = loaded.model(ids_T[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
    if not torch.isfinite(logits_V).all():
        raise CannotMeasure(f"{loaded.ref} gives logits that are not finite numbers here; open it in float32")
    return logits_V


def swapped(loaded: LoadedModel, whole: Whole, layer: int, slot: int, expert: int) -> Tensor:
    """Logits [V] with another expert in the token's slot, from the layer on."""

    def edit(seen: Routed) -> Decision | None:
        if seen.layer != layer:
            return None
        experts_TK, weights_TK = seen.experts_TK.clone(), seen.weights_TK
        experts_TK[-1, slot] = expert
        return experts_TK, weights_TK

    with (
        blocks_returning(loaded, whole.returned, before=layer),
        routed(loaded, change=Change(edit=edit), first_layer=layer),
    ):
        return _last_logits(loaded, whole.ids_T)


def with_k(loaded: LoadedModel, whole: Whole, k: int) -> Tensor:
    """Logits [V] when the routers give the last token its k best; the others keep what they had."""

    def edit(seen: Routed) -> Decision:
        experts_TK, weights_TK = whole.decisions[seen.layer]
        width = max(experts_TK.shape[1], k)
        experts_TW = experts_TK.new_full((len(experts_TK), width), NOBODY)
        weights_TW = weights_TK.new_zeros(len(weights_TK), width)
        experts_TW[:-1, : experts_TK.shape[1]], weights_TW[:-1, : weights_TK.shape[1]] = (
            experts_TK[:-1],
            weights_TK[:-1],
        )
        experts_TW[-1, :k], weights_TW[-1, :k] = seen.experts_TK[-1], seen.weights_TK[-1]
        return experts_TW, weights_TW

    with routed(loaded, change=Change(top_k=k, edit=edit)):
        return _last_logits(loaded, whole.ids_T)


def slots(decision: Decision) -> list[tuple[int, float]]:
    """The token's chosen experts and weights, heaviest first."""
    experts_K, weights_K = (part[-1].tolist() for part in decision)
    return sorted(zip(experts_K, weights_K, strict=True), key=lambda pair: -pair[1])
