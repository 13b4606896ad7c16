"""One piece of text routed by two models: where the experts differ, and what the difference costs.

Legend: L MoE layers, T tokens, K slots, E experts, N = T − 1 predicted tokens.

The original's experts are what numbers mean here: a variant with fewer is counted by what its experts were there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput
from core.lazy import torch
from core.probes._rerouted import Predicted, predict
from core.routing.discover import MoeLayer
from core.routing.kept import kept_experts
from core.routing.lens import Change, Decision, layers_of, routed
from core.routing.statistics import dense_weights, overlap_at_k, weight_drift
from core.routing.trace import RoutingTrace, trace

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Names = Mapping[int, Ints]
"""Block index → the original's number of each of the variant's experts."""


def names_of(
    loaded: LoadedModel, reference: LoadedModel
) -> tuple[tuple[MoeLayer, ...], tuple[MoeLayer, ...], Names]:
    """Both models' MoE layers, and what the variant's experts are called in the original.

    Raises ``BadInput`` where other blocks route, or where experts are gone and nothing says which.
    """
    ours, theirs = layers_of(loaded), layers_of(reference)
    if [layer.layer for layer in ours] != [layer.layer for layer in theirs]:
        raise BadInput(
            f"{loaded.ref} and {reference.ref} route in different layers; pick a variant of the same base"
        )
    kept = kept_experts(loaded.folder)
    same_counts = all(a.n_experts == b.n_experts for a, b in zip(ours, theirs, strict=True))
    if same_counts and kept == kept_experts(reference.folder):
        return ours, theirs, {layer.layer: np.arange(layer.n_experts) for layer in ours}
    complete = kept is not None and all(
        len(kept.get(a.layer, ())) == a.n_experts and max(kept[a.layer]) < b.n_experts
        for a, b in zip(ours, theirs, strict=True)
    )
    if kept is None or not complete:
        raise BadInput(
            f"{loaded.ref} has {ours[0].n_experts} experts per layer where {reference.ref} has {theirs[0].n_experts}, and "
            "its files do not say which were kept, so their routing cannot be compared; make the variant again with this "
            "version, or compare both by evaluation"
        )
    return ours, theirs, {layer: np.array(experts) for layer, experts in kept.items()}


@dataclass(frozen=True)
class Drift:
    """What two models did on the same tokens. ``replayed``: the variant, made to route as the original."""

    texts: tuple[str, ...]
    original: RoutingTrace
    experts_LTK: NDArray[np.int16]
    """The variant's choices by the original's numbers."""
    weights_LTK: NDArray[np.float32]
    nats_original: Floats
    nats_variant: Floats
    nats_replayed: Floats
    top_original: Ints
    top_variant: Ints

    @property
    def overlap_LT(self) -> Floats:
        """Share of the original's experts that the variant chose, too."""
        return overlap_at_k(self.original.experts_LTK, self.experts_LTK)

    @property
    def weight_drift_LT(self) -> Floats:
        """½ Σ_e |g − g'|: routing weight that went elsewhere."""
        n_experts = self.original.n_experts
        return weight_drift(
            dense_weights(self.original.experts_LTK, self.original.weights_LTK, n_experts),
            dense_weights(self.experts_LTK, self.weights_LTK, n_experts),
        )

    @property
    def delta(self) -> Floats:
        """Surprisal that the variant adds, per predicted token [N]."""
        return self.nats_variant - self.nats_original

    @property
    def weight_error(self) -> Floats:
        """What is added although the routing is the original's."""
        return self.nats_replayed - self.nats_original

    @property
    def routing_error(self) -> Floats:
        """What the variant's own routing adds to that; with ``weight_error`` it makes ``delta``."""
        return self.nats_variant - self.nats_replayed

    def moved_LEE(self) -> Floats:
        """How often each expert's token went to each other expert instead; the last column: to nobody.

        A token that lost m experts and gained n counts 1/n for each of the m · n pairs, so a layer's map sums to the
        slots that moved.
        """
        return np.stack(
            [
                _moved(a_TK, b_TK, self.original.n_experts)
                for a_TK, b_TK in zip(self.original.experts_LTK, self.experts_LTK, strict=True)
            ]
        )


def compare(loaded: LoadedModel, reference: LoadedModel, ids_T: Tensor, names: Names) -> tuple[Drift, float]:
    """Run a piece through original, variant and replay; also what replaying the variant's own routing misses it by.

    Hold both locks and be in inference mode.
    """
    ids = ids_T.tolist()
    original, own = trace(reference, ids), trace(loaded, ids)
    base, variant = predict(reference, ids_T.to(reference.device)), predict(loaded, ids_T)
    replayed = _replay(loaded, ids_T, _by_variant(original, names))
    again = _replay(loaded, ids_T, _decisions(own))
    drift = Drift(
        texts=own.texts,
        original=original,
        experts_LTK=np.stack(
            [
                _renamed(experts_TK, names[at])
                for at, experts_TK in zip(own.layers, own.experts_LTK, strict=True)
            ]
        ),
        weights_LTK=own.weights_LTK,
        nats_original=base.nats_N,
        nats_variant=variant.nats_N,
        nats_replayed=replayed.nats_N,
        top_original=base.top_N,
        top_variant=variant.top_N,
    )
    return drift, float(np.abs(again.nats_N - variant.nats_N).max())


def _replay(loaded: LoadedModel, ids_T: Tensor, decisions: Mapping[int, Decision]) -> Predicted:
    with routed(loaded, change=Change(replay=decisions)):
        return predict(loaded, ids_T)


def _decisions(traced: RoutingTrace) -> dict[int, Decision]:
    return {
        layer: (
            torch.from_numpy(traced.experts_LTK[at].astype(np.int64)),
            torch.from_numpy(traced.weights_LTK[at]),
        )
        for at, layer in enumerate(traced.layers)
    }


def _by_variant(original: RoutingTrace, names: Names) -> dict[int, Decision]:
    """The original's decision in the variant's numbers; an expert that is gone puts out nothing."""
    found = {}
    for layer, (experts_TK, weights_TK) in _decisions(original).items():
        number_E = torch.full((original.n_experts + 1,), -1)  # the last entry answers for -1
        number_E[torch.from_numpy(names[layer])] = torch.arange(len(names[layer]))
        found[layer] = number_E[experts_TK], weights_TK
    return found


def _renamed(experts_TK: NDArray[np.int16], names_E: Ints) -> NDArray[np.int16]:
    named_TK = names_E[np.maximum(experts_TK, 0)]
    return np.where(experts_TK < 0, -1, named_TK).astype(np.int16)


def _moved(a_TK: NDArray[np.int16], b_TK: NDArray[np.int16], n_experts: int) -> Floats:
    chosen = np.zeros((2, len(a_TK), n_experts + 1))
    for which, experts_TK in enumerate((a_TK, b_TK)):
        np.put_along_axis(
            chosen[which], np.where(experts_TK < 0, n_experts, experts_TK).astype(np.int64), 1, 1
        )
    chosen[:, :, n_experts] = 0  # empty slots
    lost_TE = chosen[0] * (1 - chosen[1])
    gained_TE = chosen[1] * (1 - chosen[0])
    gained_TE[gained_TE.sum(1) == 0, n_experts] = 1
    moved_EE: Floats = lost_TE[:, :n_experts].T @ (gained_TE / gained_TE.sum(1, keepdims=True))
    return moved_EE
