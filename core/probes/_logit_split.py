"""A logit as a sum over everything that was written to the residual stream at its position.

Legend: D d_model, K head_dim, H heads, N neurons, V vocabulary.

The sum is exact once every norm's scale is frozen (``_norm_fold.py``): what is missing from the model's own logit is
rounding. Knows no settings and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from core.lazy import torch
from core.models.experts import down_bias, down_weight
from core.models.weights import input_first, neuron_weight
from core.probes._norm_fold import FrozenNorm, freeze, project
from core.probes._residual_parts import ResidualParts, Written, weighted_neurons
from core.probes._targets import Token

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


@dataclass(frozen=True)
class LogitReader:
    """One number read from logits: target, target − distractor, or target − mean; before any softcap."""

    target: int
    distractor: int | None
    minus_mean: bool
    scale: float

    def __call__(self, values_V: Tensor) -> Tensor:
        """The number, of raw logits [V] or, row by row, of the unembedding's weight [V, D] (giving [D])."""
        read = values_V[self.target].double()
        if self.distractor is not None:
            read = read - values_V[self.distractor].double()
        elif self.minus_mean:
            read = read - values_V.mean(0, dtype=torch.float64)
        return read * self.scale


def reader(loaded: LoadedModel, target: Token, distractor: Token | None, *, minus_mean: bool) -> LogitReader:
    """What to read, with the model's logit scale."""
    other = None if distractor is None else distractor.id
    return LogitReader(target.id, other, minus_mean, loaded.anatomy.logit_scale)


@dataclass(frozen=True)
class Part:
    """One row of the sum; ``layer`` is −1 for the embeddings and n_layers for the constants of norm and head."""

    name: str
    kind: str
    layer: int
    head: int | None
    contribution: float


@dataclass(frozen=True)
class Neurons:
    """All neurons of one MLP, or of one expert that the position chose."""

    layer: int
    expert: int | None
    activation_N: np.ndarray
    """Of an expert: times its routing weight."""
    contribution_N: np.ndarray

    def name(self, neuron: int) -> str:
        """How a neuron is called: L3N17, or L3E5N17 in expert 5."""
        return f"L{self.layer}{'' if self.expert is None else f'E{self.expert}'}N{neuron}"


@dataclass(frozen=True)
class Split:
    """A logit and its parts."""

    parts: tuple[Part, ...]
    neurons: tuple[Neurons, ...]
    logit: float
    """The model's own number."""

    @property
    def total(self) -> float:
        """Σ parts."""
        return math.fsum(part.contribution for part in self.parts)


def split_logit(loaded: LoadedModel, parts: ResidualParts, read: LogitReader) -> Split:
    """Split what ``read`` reads at this position. Raises ``CannotMeasure`` for a norm that is not γ / σ."""
    model, anatomy = loaded.model, loaded.anatomy
    head = model.get_submodule(anatomy.unembedding)
    final = freeze_at(loaded, str(anatomy.final_norm), parts.final_D, parts.normed_D)
    after_norm_D = read(head.weight)
    stream_D = final.pull(after_norm_D)
    found = list(_embeddings(parts, stream_D))
    neurons: list[Neurons] = []
    for written in parts.blocks:
        found += _attention(loaded, written, stream_D)
        mlp, its_neurons = _mlp(loaded, written, stream_D)
        found += mlp
        neurons += its_neurons
    last = anatomy.n_layers
    if final.shift_D is not None:
        found.append(Part("final norm's bias", "bias", last, None, final.constant(after_norm_D)))
    if head.bias is not None:
        found.append(Part("unembedding's bias", "bias", last, None, float(read(head.bias))))
    return Split(tuple(found), tuple(neurons), float(read(parts.raw_logits_V)))


def _embeddings(parts: ResidualParts, stream_D: Tensor) -> Iterator[Part]:
    start_D = parts.start_D.double()
    if parts.position_D is not None:
        position_D = parts.position_D.double()
        start_D = start_D - position_D
        yield Part("position embedding", "embedding", -1, None, float(position_D @ stream_D))
    yield Part("token embedding", "embedding", -1, None, float(start_D @ stream_D))


def _attention(loaded: LoadedModel, written: Written, stream_D: Tensor) -> Iterator[Part]:
    """One part per head; the output's bias, and an after-norm's, as one more."""
    module = loaded.model.get_submodule(written.block.o)
    layer = written.block.index
    direction_D, constant = _before_write(
        loaded, written.block.attention_write, written.attention_fed_D, written.attention_D, stream_D
    )
    read_HK = project(input_first(module), direction_D).view_as(written.heads_HK)
    for head, value in enumerate((written.heads_HK.double() * read_HK).sum(-1).tolist()):
        yield Part(f"L{layer}H{head}", "attention head", layer, head, value)
    constant += _bias(module, direction_D)
    if constant:
        yield Part(f"L{layer} attention bias", "bias", layer, None, constant)


def _mlp(loaded: LoadedModel, written: Written, stream_D: Tensor) -> tuple[list[Part], list[Neurons]]:
    """The MLP as one part (its bias included), or each chosen expert and the shared one; and their neurons."""
    model, block = loaded.model, written.block
    direction_D, constant = _before_write(loaded, block.mlp_write, written.mlp_fed_D, written.mlp_D, stream_D)
    if written.neurons_N is not None:
        neurons = _weigh(block.index, None, written.neurons_N, neuron_weight(model, block), direction_D)
        constant += _bias(model.get_submodule(str(block.down)), direction_D)
        value = float(neurons.contribution_N.sum()) + constant
        return [Part(f"MLP {block.index}", "MLP", block.index, None, value)], [neurons]
    routed = written.routed
    assert routed is not None
    experts = model.get_submodule(str(block.experts))
    values_EN = weighted_neurons(experts, routed)
    found = []
    parts = []
    for expert, weight, values_N in zip(routed.chosen_E.tolist(), routed.weight_E, values_EN, strict=True):
        neurons = _weigh(block.index, expert, values_N, down_weight(experts, expert), direction_D)
        bias_D = down_bias(experts, expert)
        biased = 0.0 if bias_D is None else float(weight * bias_D.double() @ direction_D)
        value = float(neurons.contribution_N.sum()) + biased
        found.append(neurons)
        parts.append(Part(f"L{block.index} expert {expert}", "expert", block.index, None, value))
    if block.shared_expert is not None:
        shared_D = written.mlp_fed_D.double() - routed.output_D.double()
        parts.append(
            Part(f"L{block.index} shared expert", "expert", block.index, None, float(shared_D @ direction_D))
        )
    if constant:
        parts.append(Part(f"L{block.index} MLP norm's bias", "bias", block.index, None, constant))
    return parts, found


def _weigh(
    layer: int, expert: int | None, values_N: Tensor, weight_ND: Tensor, direction_D: Tensor
) -> Neurons:
    contribution_N = values_N.double() * project(weight_ND, direction_D)
    return Neurons(layer, expert, values_N.double().cpu().numpy(), contribution_N.cpu().numpy())


def _before_write(
    loaded: LoadedModel, path: str, fed_D: Tensor, written_D: Tensor, stream_D: Tensor
) -> tuple[Tensor, float]:
    """The direction that a sublayer's own output is read along, and what an after-norm adds by itself."""
    if loaded.anatomy.norm_place != "sandwich":
        return stream_D * loaded.anatomy.residual_scale, 0.0
    norm = freeze_at(loaded, path, fed_D, written_D)
    return norm.pull(stream_D), norm.constant(stream_D)


def freeze_at(loaded: LoadedModel, path: str, fed_D: Tensor, output_D: Tensor) -> FrozenNorm:
    """The norm at ``path`` frozen as it ran."""
    norm = loaded.model.get_submodule(path)
    return freeze(norm, path, offset=loaded.anatomy.norm_offset, fed_D=fed_D, output_D=output_D)


def _bias(module: Any, direction_D: Tensor) -> float:
    return 0.0 if module.bias is None else float(module.bias.double() @ direction_D)
