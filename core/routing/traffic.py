"""What a mixture of experts costs at the edge: bytes read per token, memory held, milliseconds they take.

Decoding one token is bound by the bytes it reads (Williams et al., Roofline, CACM 52(4), 2009): all dense weights, and
of every MoE layer the experts that were chosen. With only C experts per layer in fast memory, a missing one comes
from slow storage first. Times here are these bytes through two stated bandwidths, one after the other: a lower bound
without arithmetic, without overlap. Legend: L MoE layers, C slots per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core.models.sizes import component_sizes, kv_cache_bytes
from core.routing.discover import moe_layers

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Traffic:
    """A model's weights as one decoded token meets them, at ``bits`` per weight."""

    bits: float
    dense_parameters: int
    """Read for every token: all but routed experts, and but an input embedding of which one row is looked up."""
    held_parameters: int
    """In memory at all times: all but routed experts."""
    expert_parameters: Mapping[int, int]
    """Of one expert, by block index."""

    @classmethod
    def of(cls, loaded: LoadedModel, *, bits: float) -> Traffic:
        """Counted from the model's own tensors; a tied embedding is read whole, as the unembedding."""
        sizes = component_sizes(loaded)
        routed = sizes[sizes["component"] == "experts"].groupby("layer")["parameters"].sum()
        layers = {layer.layer: layer.n_experts for layer in moe_layers(loaded)}
        held = int(sizes["parameters"].sum() - routed.sum())
        looked_up = sizes[(sizes["component"] == "embedding") & ~sizes["tied"]]["parameters"].sum()
        return cls(
            bits, held - int(looked_up), held, {layer: int(routed[layer]) // n for layer, n in layers.items()}
        )

    def bytes_of(self, parameters: ArrayLike) -> Floats:
        """Bytes of so many weights."""
        return np.asarray(np.asarray(parameters, dtype=np.float64) * self.bits / 8, dtype=np.float64)

    def expert_bytes_L(self) -> Floats:
        """Bytes of one expert in each MoE layer."""
        return self.bytes_of(list(self.expert_parameters.values()))

    def per_token(self, top_k: int | Mapping[int, int]) -> float:
        """Bytes that decoding one token reads: b · (dense + Σ_l k_l · p_l)."""
        chosen = sum(
            parameters * (top_k[layer] if isinstance(top_k, Mapping) else top_k)
            for layer, parameters in self.expert_parameters.items()
        )
        return float(self.bytes_of(self.dense_parameters + chosen))

    def memory(self, slots_C: NDArray[np.int64]) -> Floats:
        """Bytes held with C experts of each layer in fast memory: b · (held + Σ_l C · p_l)."""
        return self.bytes_of(self.held_parameters + slots_C * float(sum(self.expert_parameters.values())))

    def milliseconds(self, used_LS: Floats, missed_LS: Floats, *, fast: float, slow: float) -> Floats:
        """Time of each step [S] that used and missed so many experts of each layer.

        Bandwidths in bytes per second: used weights pass the fast one, missed experts the slow one before.
        """
        expert_L = self.expert_bytes_L()
        through_fast_S = self.bytes_of(self.dense_parameters) + expert_L @ used_LS
        return np.asarray(1e3 * (through_fast_S / fast + expert_L @ missed_LS / slow), dtype=np.float64)


def cache_bytes(loaded: LoadedModel, context: int) -> int:
    """Bytes of keys and values of ``context`` positions at 16 bits each."""
    return kv_cache_bytes(loaded.anatomy, dtype_bytes=2, context=context)
