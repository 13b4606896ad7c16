"""What a mixture of experts decided, and what it shall do differently: the records of the routing lens.

Legend: ``T`` rows of one call (batch · positions, padding included), ``K`` slots per token, ``E`` experts, ``D``
hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from core.numerics.schemes import IntegerScheme

Decision = tuple["Tensor", "Tensor"]
"""Chosen experts [T, K] and their routing weights [T, K]."""


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
