"""What the experts of one layer do over text, chosen or not: what merging decides by.

Every expert computes every token, so that experts which never meet the same token can be compared. A forward pass ends
at the layer that is read. Reads the model, changes nothing.

Legend: ``E`` experts, ``T`` tokens, ``K`` slots, ``D`` hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.lazy import torch
from core.routing.alignment import neuron_activations
from core.routing.lens import Routed, routed
from core.routing.merging import column_cosine, mean_cosine
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.routing.discover import MoeLayer

Floats = NDArray[np.float64]
AT_ONCE = 1 << 24
"""Numbers of outputs held at a time: 64 MB in float32."""
SAMPLE_TOKENS = 1024
"""Tokens whose hidden states are kept, to compare neurons on."""


class _Enough(Exception):
    """Ends a forward pass whose later layers nobody asked for."""


@dataclass(frozen=True, eq=False)
class Profile:
    """One layer's experts over the tokens that were read."""

    load_E: Floats
    """Times each was chosen."""
    saliency_E: Floats
    """REAP (arXiv 2510.13999): mean of routing weight · ‖output‖ over the tokens that chose it; 0 where none did."""
    mean_ED: Floats
    """Mean output over all tokens."""
    output_cosine_EE: Floats
    """Mean over all tokens of the cosine of two experts' outputs."""
    logit_cosine_EE: Floats | None
    """Cosine of two experts' router logits over the tokens; None where this family's router gives none."""
    experts_TK: NDArray[np.int64]
    hidden_TD: Tensor
    """Of a sample of the tokens."""

    def similarity_EE(self) -> Floats:
        """REAM's: the mean of both cosines, or that of the outputs alone."""
        if self.logit_cosine_EE is None:
            return self.output_cosine_EE
        return (self.output_cosine_EE + self.logit_cosine_EE) / 2

    def share_sharing(self, group_E: NDArray[np.int64]) -> float:
        """Share of tokens that chose two experts of one group; ``group_E`` names each expert's."""
        groups_TK = np.sort(group_E[self.experts_TK], axis=1)
        return float((groups_TK[:, 1:] == groups_TK[:, :-1]).any(1).mean())


def read_profile(
    loaded: LoadedModel, layer: MoeLayer, passages: Sequence[Sequence[int]], progress: Progress
) -> Profile:
    """Run every passage up to ``layer`` and sum up what each of its experts computes.

    Costs E / K times the layer's own work. Hold ``loaded.lock`` and run without gradients.
    """
    experts = loaded.model.get_submodule(layer.experts)
    sums = _Sums(layer.n_experts)

    def observe(seen: Routed) -> None:
        if seen.layer == layer.layer:
            sums.add(seen, experts)
            raise _Enough

    for done, passage in enumerate(passages):
        progress(done, len(passages), f"reading layer {layer.layer}: passage {done + 1} of {len(passages)}")
        with suppress(_Enough), routed(loaded, observe):
            loaded.model(torch.tensor([list(passage)], device=loaded.device), use_cache=False)
    return sums.profile()


def expert_output(experts: Any, expert: int, hidden_TD: Tensor) -> Tensor:
    """[T, D]: what one expert of a fused module makes of every token, by the family's own code.

    Llama-4's experts, which the router scales at their input, are given it unscaled.
    """
    if not hasattr(experts, "_apply_gate"):
        found: Tensor = neuron_activations(experts, expert, hidden_TD) @ experts.down_proj[expert]
        return found
    chosen_T1 = torch.full((len(hidden_TD), 1), expert, device=hidden_TD.device)
    # ``forward`` and not a call: the hooks on this module watch the routing, and this is none.
    found = experts.forward(hidden_TD, chosen_T1, torch.ones_like(chosen_T1, dtype=hidden_TD.dtype))
    return found


class _Sums:
    """Sums over the passages."""

    def __init__(self, n_experts: int) -> None:
        self.n = n_experts
        self.load_E = np.zeros(n_experts)
        self.gated_E = np.zeros(n_experts)
        self.cosine_EE = np.zeros((n_experts, n_experts))
        self.mean_ED: Any = 0.0
        self.experts: list[NDArray[np.int64]] = []
        self.logits: list[Tensor] = []
        self.hidden: list[Tensor] = []

    def add(self, seen: Routed, experts: Any) -> None:
        hidden_TD = seen.hidden_TD.detach()
        self.experts.append(seen.experts_TK.cpu().numpy())
        if seen.logits_TE is not None:
            self.logits.append(seen.logits_TE.float().cpu())
        if sum(map(len, self.hidden)) < SAMPLE_TOKENS:
            self.hidden.append(hidden_TD[:SAMPLE_TOKENS].clone())
        gate_TE = torch.zeros(len(hidden_TD), self.n + 1, device=hidden_TD.device)
        gate_TE.scatter_(1, seen.experts_TK.clamp(min=-1) % (self.n + 1), seen.weights_TK)
        self.load_E += np.bincount(seen.experts_TK[seen.experts_TK >= 0].cpu().numpy(), minlength=self.n)
        for rows in self._rows(hidden_TD):
            outputs_ETD = torch.stack(
                [expert_output(experts, expert, hidden_TD[rows]) for expert in range(self.n)]
            ).float()
            norms_ET = outputs_ETD.norm(dim=-1)
            self.gated_E += (norms_ET * gate_TE[rows, :-1].T).sum(1).double().cpu().numpy()
            self.mean_ED = self.mean_ED + outputs_ETD.double().sum(1).cpu().numpy()
            self.cosine_EE += mean_cosine(outputs_ETD) * outputs_ETD.shape[1]

    def _rows(self, hidden_TD: Tensor) -> Iterator[slice]:
        step = max(1, AT_ONCE // (self.n * hidden_TD.shape[1]))
        return (slice(first, first + step) for first in range(0, len(hidden_TD), step))

    def profile(self) -> Profile:
        experts_TK = np.concatenate(self.experts)
        n_tokens = len(experts_TK)
        return Profile(
            self.load_E,
            self.gated_E / np.maximum(self.load_E, 1),
            self.mean_ED / n_tokens,
            self.cosine_EE / n_tokens,
            column_cosine(torch.cat(self.logits)) if self.logits else None,
            experts_TK,
            torch.cat(self.hidden)[:SAMPLE_TOKENS],
        )
