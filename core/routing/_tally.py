"""Counting decisions as they are made: the accumulator behind ``aggregate.py``.

Everything is kept on the model's device and as float64 or int64, so that sums over millions of tokens stay exact.

Legend: ``L`` MoE layers in order, ``E`` experts, ``K`` slots, ``T`` rows of one forward call, ``V`` vocabulary, ``U``
documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.lazy import torch
from core.routing.lens import Routed
from core.routing.scores import distribution, entropy

if TYPE_CHECKING:
    from torch import Tensor

    from core.routing.discover import MoeLayer


@dataclass(frozen=True)
class Wanted:
    """Which counts are kept beside the cheap ones, and the sizes of their tables."""

    norms: bool
    tokens: int
    """V, to count experts per token; 0 not to."""
    predicted: int
    """V, to count experts per predicted token; 0 not to."""
    documents: int
    """U, to count per document; 0 not to."""


class Tally:
    """Sums over all decisions seen; call ``start``, run the model under ``observe``, call ``finish``, and again."""

    def __init__(self, layers: Sequence[MoeLayer], wanted: Wanted, device: Any) -> None:
        self._layers = layers
        self._row = {layer.layer: row for row, layer in enumerate(layers)}
        self.wanted = wanted
        n_layers, n_experts = len(layers), max(layer.n_experts for layer in layers)
        self._n_experts = n_experts

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(n_layers, *shape, dtype=dtype, device=device)

        self.sums: dict[str, Tensor] = {
            "load_LE": zeros(n_experts, dtype=torch.int64),
            "first_LE": zeros(n_experts, dtype=torch.int64),
            "weight_LE": zeros(n_experts, dtype=torch.float64),
            "coactivation_LEE": zeros(n_experts, n_experts, dtype=torch.int64),
            "flow_LEE": zeros(n_experts, n_experts, dtype=torch.int64),
            "probability_LE": zeros(n_experts, dtype=torch.float64),
            "entropy_sum_L": zeros(dtype=torch.float64),
        }
        if wanted.norms:
            for name in ("norm_sum_LE", "norm_sq_sum_LE", "gated_norm_sum_LE"):
                self.sums[name] = zeros(n_experts, dtype=torch.float64)
        if wanted.tokens:
            self.sums["token_expert_LVE"] = zeros(wanted.tokens, n_experts, dtype=torch.int32)
        if wanted.predicted:
            self.sums["predicted_expert_LVE"] = zeros(wanted.predicted, n_experts, dtype=torch.int32)
        if wanted.documents:
            self.sums["first_by_document_LUE"] = zeros(wanted.documents, n_experts, dtype=torch.int32)
        self.n_tokens = 0
        self._tokens_T: Tensor
        self._documents_T: Tensor
        self._previous_TE: Tensor | None = None
        self._chosen: dict[int, Tensor] = {}

    def start(self, tokens_T: Tensor, documents_T: Tensor, n_valid: int) -> None:
        """Say which tokens and documents the rows of the next forward call are."""
        self._tokens_T, self._documents_T = tokens_T, documents_T
        self._previous_TE = None
        self._chosen.clear()
        self.n_tokens += n_valid

    def observe(self, at: Routed) -> None:
        """Count one layer's decision."""
        row = self._row[at.layer]
        # Column E takes the slots that reach no expert.
        experts_TK = at.experts_TK.where(at.experts_TK >= 0, self._n_experts)
        ones_TK = torch.ones_like(at.weights_TK)
        chosen_TE = self._spread(experts_TK, ones_TK)
        self.sums["load_LE"][row] += chosen_TE.sum(0).long()
        self.sums["coactivation_LEE"][row] += (chosen_TE.T @ chosen_TE).long()
        if self._previous_TE is not None:
            self.sums["flow_LEE"][row - 1] += (self._previous_TE.T @ chosen_TE).long()
        self._previous_TE = chosen_TE
        self._add("weight_LE", row, experts_TK, at.weights_TK)
        first_T = experts_TK.gather(1, at.weights_TK.argmax(1, keepdim=True)).squeeze(1)
        self._add("first_LE", row, first_T, torch.ones_like(first_T))
        self._add_router(row, at)
        if self.wanted.norms:
            assert at.norms_TK is not None, "the lens was not asked for norms"
            self._add("norm_sum_LE", row, experts_TK, at.norms_TK)
            self._add("norm_sq_sum_LE", row, experts_TK, at.norms_TK.double() ** 2)
            self._add("gated_norm_sum_LE", row, experts_TK, at.weights_TK.double() * at.norms_TK)
        if self.wanted.tokens:
            self._count("token_expert_LVE", row, self._tokens_T.unsqueeze(1), experts_TK)
        if self.wanted.documents:
            self._count("first_by_document_LUE", row, self._documents_T, first_T)
        if self.wanted.predicted:
            self._chosen[row] = experts_TK

    def finish(self, predicted_T: Tensor | None) -> None:
        """Count the call's experts per predicted token, which is known only after the last layer."""
        if predicted_T is not None:
            for row, experts_TK in self._chosen.items():
                self._count("predicted_expert_LVE", row, predicted_T.unsqueeze(1), experts_TK)

    def _spread(self, experts_TK: Tensor, values_TK: Tensor) -> Tensor:
        """[T, E] with each slot's value at its expert."""
        spread_TE = values_TK.new_zeros(len(experts_TK), self._n_experts + 1)
        return spread_TE.scatter_add_(1, experts_TK, values_TK)[:, : self._n_experts]

    def _add(self, name: str, row: int, experts: Tensor, values: Tensor) -> None:
        sums_E = self.sums[name].new_zeros(self._n_experts + 1)
        sums_E.scatter_add_(0, experts.reshape(-1), values.reshape(-1).to(sums_E.dtype))
        self.sums[name][row] += sums_E[: self._n_experts]

    def _add_router(self, row: int, at: Routed) -> None:
        shares_TE = None if at.logits_TE is None else distribution(self._layers[row].rule, at.logits_TE)
        if shares_TE is None:
            self.sums["probability_LE"][row] = float("nan")
            self.sums["entropy_sum_L"][row] = float("nan")
            return
        shares_TE = shares_TE[at.valid_T]
        self.sums["probability_LE"][row, : shares_TE.shape[1]] += shares_TE.sum(0, dtype=torch.float64)
        self.sums["entropy_sum_L"][row] += entropy(shares_TE).sum(dtype=torch.float64)

    def _count(self, name: str, row: int, keys: Tensor, experts: Tensor) -> None:
        """Add 1 at [key, expert] of a table for every slot that reached an expert."""
        reached = experts < self._n_experts
        flat = keys.expand_as(experts)[reached] * self._n_experts + experts[reached]
        table = self.sums[name][row].view(-1)
        table.index_add_(0, flat, torch.ones_like(flat, dtype=table.dtype))
