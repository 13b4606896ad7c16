"""Experts that say the same to every token: constants, and how a plain checkpoint can hold one.

MoNE (arXiv 2507.00390) replaces an expert by its mean output. Formats that plain transformers loads have no constant
experts: all experts of a layer have one shape, so a constant has to be written as weights of that shape. Two ways are
exact; where neither applies, nothing is:

* *bias*: a family whose experts have biases (gpt-oss) holds c as the bias of a zero down projection.
* *squares*: activations with act(z)·z + act(−z)·(−z) = z² (SiLU, GELU, ReLU, because σ(z) + σ(−z) = 1) give z² from two
  gated neurons. What the experts read is an RMS norm's output, x = γ ⊙ u with Σ uᵢ² = D, so that the 2 D neurons with
  rows ± eᵢ / γᵢ in gate and up sum to D whatever the token, and a down projection of c / D gives c. It takes
  I ≥ 2 D, and is exact up to the norm's ε.

Legend: ``E`` experts, ``T`` tokens, ``K`` slots, ``D`` hidden, ``I`` expert intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.errors import CannotCompress
from core.lazy import torch
from core.routing.lens import Routed, routed
from core.routing.surgery import ExpertWeights

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.routing.discover import MoeLayer

Form = Literal["bias", "squares"]
TOLERANCE = 1e-3
"""Largest |Σ uᵢ² / D − 1| over the tokens read, i.e. how far ε moves a constant written as squares."""


@dataclass(frozen=True, eq=False)
class OutputMoments:
    """What each expert of one layer put out for the tokens routed to it."""

    tokens_E: NDArray[np.int64]
    mean_ED: Tensor
    """float64; zero for an expert that nothing reached."""
    mean_square_E: NDArray[np.float64]
    """Mean of ‖f(x)‖²."""

    @property
    def std_E(self) -> NDArray[np.float64]:
        """√(Σ ‖f − f̄‖² / (n − 1)); 0 below two tokens."""
        n = self.tokens_E
        centred = np.maximum(0.0, self.mean_square_E - self.mean_ED.square().sum(-1).cpu().numpy())
        found: NDArray[np.float64] = np.sqrt(centred * n / np.maximum(1, n - 1))
        return found

    @property
    def redundancy_score_E(self) -> NDArray[np.float64]:
        """MoNE's: frequency × standard deviation of the output; the lowest are replaced."""
        score: NDArray[np.float64] = self.tokens_E / max(1, int(self.tokens_E.sum())) * self.std_E
        return score


def output_moments(
    loaded: LoadedModel, layers: Sequence[MoeLayer], texts: Sequence[Sequence[int]]
) -> dict[int, OutputMoments]:
    """Run the texts and sum up every expert's outputs, layer → moments; hold ``loaded.lock``."""
    sums = {at.layer: _Sums(at.n_experts, loaded.anatomy.d_model, loaded.device) for at in layers}

    def observe(at: Routed) -> None:
        sums[at.layer].add(at)

    for ids in texts:
        with torch.inference_mode(), routed(loaded, observe, outputs=True):
            loaded.model(input_ids=torch.tensor([list(ids)], device=loaded.device), use_cache=False)
    return {layer: found.moments() for layer, found in sums.items()}


class _Sums:
    """Sums over tokens; row E takes the slots that reach no expert."""

    def __init__(self, n_experts: int, width: int, device: str) -> None:
        self.n = n_experts
        self.count_E = torch.zeros(n_experts + 1, dtype=torch.int64, device=device)
        self.square_E = torch.zeros(n_experts + 1, dtype=torch.float64, device=device)
        self.sum_ED = torch.zeros(n_experts + 1, width, dtype=torch.float64, device=device)

    def add(self, at: Routed) -> None:
        assert at.outputs_TKD is not None, "the lens was asked for outputs"
        expert = at.experts_TK.where(at.experts_TK >= 0, self.n).flatten()
        outputs = at.outputs_TKD.flatten(0, 1).double()
        self.count_E.index_add_(0, expert, torch.ones_like(expert))
        self.square_E.index_add_(0, expert, outputs.square().sum(-1))
        self.sum_ED.index_add_(0, expert, outputs)

    def moments(self) -> OutputMoments:
        n_E = self.count_E[: self.n].clamp(min=1)
        return OutputMoments(
            self.count_E[: self.n].cpu().numpy(),
            self.sum_ED[: self.n] / n_E[:, None],
            (self.square_E[: self.n] / n_E).cpu().numpy(),
        )


def form_of(loaded: LoadedModel, layer: MoeLayer, hidden_TD: Tensor) -> Form:
    """How a constant expert can be written in this layer; raises ``CannotCompress`` with the reason where it cannot.

    ``hidden_TD`` is what the layer's experts read, to check the norm on.
    """
    experts: Any = loaded.model.get_submodule(layer.experts)
    if layer.shim:
        raise CannotCompress(
            f"{layer.experts} scales its inputs by the routing weight, so no expert can be a constant; prune instead"
        )
    if experts.has_bias:
        return "bias"
    width, neurons = loaded.anatomy.d_model, experts.down_proj.shape[1 if experts.is_transposed else 2]
    if not experts.has_gate or not _squares(experts):
        raise CannotCompress(
            f"{layer.experts} has no bias to hold a constant, and its neurons do not pair up to a square; use prune_experts"
        )
    if neurons < 2 * width:
        raise CannotCompress(
            f"{layer.experts} has no bias to hold a constant, and without one a constant takes 2 · {width} neurons where "
            f"an expert has {neurons}; use prune_experts, which removes the experts"
        )
    gap = float((_direction(loaded, layer, hidden_TD).square().sum(-1) / width - 1).abs().max())
    if not gap <= TOLERANCE:
        raise CannotCompress(
            f"{layer.experts} has no bias to hold a constant, and what it reads is not an RMS norm's output of constant "
            f"length (off by {gap:.1e}, allowed {TOLERANCE:.0e}); use prune_experts"
        )
    return "squares"


def constant_expert(
    loaded: LoadedModel, layer: MoeLayer, like: ExpertWeights, form: Form, constant_D: Tensor
) -> ExpertWeights:
    """Weights of the shape of ``like`` whose expert puts out ``constant_D`` for every token."""
    if form == "bias":
        return replace(
            like, down_DI=torch.zeros_like(like.down_DI), down_bias_D=constant_D.to(like.down_DI.dtype)
        )
    width = len(constant_D)
    rows_DD = torch.diag(1 / _gain(loaded, layer).double()).to(like.up_ID.dtype)
    up_ID, down_DI = torch.zeros_like(like.up_ID), torch.zeros_like(like.down_DI)
    up_ID[: 2 * width] = torch.cat([rows_DD, -rows_DD])
    down_DI[:, : 2 * width] = (constant_D / width).to(down_DI.dtype)[:, None]
    return replace(like, gate_ID=up_ID, up_ID=up_ID.clone(), down_DI=down_DI)


def _squares(experts: Any) -> bool:
    """Whether two gated neurons of opposite sign make a square."""
    z = torch.linspace(-8, 8, 161, dtype=torch.float64)
    pair = experts._apply_gate(torch.stack([z, z], -1)) + experts._apply_gate(torch.stack([-z, -z], -1))
    return bool(torch.allclose(pair.flatten(), z.square(), atol=1e-9))


def _gain(loaded: LoadedModel, layer: MoeLayer) -> Tensor:
    """γ of the norm before the MoE block."""
    block = next(block for block in loaded.anatomy.blocks if block.index == layer.layer)
    weight: Tensor = loaded.model.get_submodule(block.mlp_norm).weight.detach()
    return weight + loaded.anatomy.norm_offset


def _direction(loaded: LoadedModel, layer: MoeLayer, hidden_TD: Tensor) -> Tensor:
    """u = x / γ, which has length √D after an RMS norm."""
    return hidden_TD.double() / _gain(loaded, layer).double()
