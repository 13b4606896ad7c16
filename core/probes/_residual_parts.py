"""What every part of a decoder wrote to the residual stream at one position, from one forward pass.

Legend: D d_model, H heads, K head_dim, N neurons, E chosen experts, V vocabulary.

Heads and neurons are kept as their activations (weighted values, neuron values), never as vectors of d_model: what
they write is that times a weight, which a reader projects as it needs.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.capture import capture
from core.errors import CannotMeasure
from core.lazy import torch
from core.models.anatomy import Anatomy, Block
from core.models.experts import expert_neurons, is_scaled_input

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.probes._tokens import Encoded


@dataclass(frozen=True)
class Routed:
    """One position's visit to a mixture of experts."""

    read_D: Tensor
    """What the experts were fed."""
    chosen_E: Tensor
    weight_E: Tensor
    output_D: Tensor
    """What the experts gave together, shared expert not included."""


@dataclass(frozen=True)
class Written:
    """What one block added to the stream, and what it was made of."""

    block: Block
    heads_HK: Tensor
    """Each head's weighted values, before W_O."""
    attention_D: Tensor
    """What attention added to the stream, before ``anatomy.residual_scale``."""
    attention_fed_D: Tensor
    """Input of ``block.attention_write``: in a sandwich, attention before its after-norm."""
    mlp_D: Tensor
    mlp_fed_D: Tensor
    neurons_N: Tensor | None
    """Neuron values, input of ``block.down``; None for a mixture of experts."""
    routed: Routed | None


@dataclass(frozen=True)
class ResidualParts:
    """One position of one forward pass."""

    start_D: Tensor
    """Input of the first block: token embedding and, where learned, the position's."""
    position_D: Tensor | None
    blocks: tuple[Written, ...]
    final_D: Tensor
    """Residual stream before the final norm."""
    normed_D: Tensor
    """After it."""
    raw_logits_V: Tensor
    """The unembedding's output, before logit scale and softcap."""
    logits_V: Tensor
    """What the model says."""


def residual_parts(loaded: LoadedModel, encoded: Encoded, position: int) -> ResidualParts:
    """Run the model once and keep one position. Hold ``loaded.lock``, inside ``inference_mode``.

    Raises ``CannotMeasure`` for experts that are not called with a decision (Llama-4).
    """
    model, anatomy = loaded.model, loaded.anatomy
    blocks = anatomy.blocks
    assert anatomy.final_norm is not None
    assert anatomy.unembedding is not None

    scaled = [b.experts for b in blocks if b.experts and is_scaled_input(model.get_submodule(b.experts))]
    if scaled:
        raise CannotMeasure(
            f"{scaled[0]} computes every expert on inputs scaled by the routing weights, so what it wrote cannot be split by "
            "expert and neuron; open a mixture of experts of another family"
        )

    def keep(path: str, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, tensor.shape[-1])[position].clone()  # OPT's MLP flattens batch and position

    def keep_first(path: str, tensor: Tensor) -> Tensor:
        return tensor[0, 0].clone()  # the unembedding is run from this position on

    dense = [block.down for block in blocks if block.down is not None]
    experts = [block.experts for block in blocks if block.experts is not None]
    writes = [path for block in blocks for path in (block.attention_write, block.mlp_write)]
    with ExitStack() as stack:

        def watch(paths: list[str], *, reduce: Any = keep, inputs: bool = False, item: int = 0) -> Any:
            return stack.enter_context(capture(model, paths, reduce=reduce, inputs=inputs, item=item))

        start = watch([blocks[0].path], inputs=True)
        heads = watch([block.o for block in blocks], inputs=True)
        written = watch(writes)
        # Only an after-norm's input is read again; other writes are modules called in each family's own way.
        fed = watch(writes, inputs=True) if anatomy.norm_place == "sandwich" else written
        neurons = watch(dense, inputs=True)
        read, chosen, weight = (watch(experts, inputs=True, item=item) for item in range(3))
        routed = watch(experts)
        final, normed = (
            watch([blocks[-1].path]),
            watch([anatomy.final_norm]),
        )
        raw = watch([anatomy.unembedding], reduce=keep_first)
        output = model(**encoded.inputs, use_cache=False, logits_to_keep=encoded.n_tokens - position)
        logits_V = output.logits[0, 0].clone()
    return ResidualParts(
        start_D=start[blocks[0].path],
        position_D=_position_row(model, anatomy, position),
        blocks=tuple(
            Written(
                block=block,
                heads_HK=heads[block.o].view(anatomy.n_heads, anatomy.head_dim),
                attention_D=written[block.attention_write],
                attention_fed_D=fed[block.attention_write],
                mlp_D=written[block.mlp_write],
                mlp_fed_D=fed[block.mlp_write],
                neurons_N=neurons[block.down] if block.down is not None else None,
                routed=None
                if block.experts is None
                else Routed(*(values[block.experts] for values in (read, chosen, weight, routed))),
            )
            for block in blocks
        ),
        final_D=final[blocks[-1].path],
        normed_D=normed[anatomy.final_norm],
        raw_logits_V=raw[anatomy.unembedding],
        logits_V=logits_V,
    )


def _position_row(model: Any, anatomy: Anatomy, position: int) -> Tensor | None:
    if anatomy.position_embedding is None:
        return None
    table = model.get_submodule(anatomy.position_embedding).weight
    row: Tensor = table[anatomy.position_offset + position]
    return row


def weighted_neurons(experts: Any, routed: Routed) -> Tensor:
    """Weighted neuron values of each chosen expert, [E, N]: what it writes is these times its down projection."""
    return torch.stack(
        [
            weight * expert_neurons(experts, expert, routed.read_D)
            for expert, weight in zip(routed.chosen_E.tolist(), routed.weight_E, strict=True)
        ]
    )
