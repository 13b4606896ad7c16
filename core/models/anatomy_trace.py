"""One forward pass on a seeded input, with everything kept that the anatomy's identities compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.capture import capture
from core.lazy import torch
from core.models.anatomy import Anatomy
from core.models.patch_grid import image_size

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = 7
SEED = 20


@dataclass(frozen=True)
class Trace:
    """What one forward pass put in and out of the modules that the identities need."""

    inputs: dict[str, Tensor]
    logits: Tensor | None
    output: dict[str, Tensor]
    fed: dict[str, Tensor]
    pattern: dict[str, Tensor]
    chosen: dict[str, Tensor]
    routing_weight: dict[str, Tensor]


def trace_seeded(model: Any, anatomy: Anatomy) -> Trace:
    """Run the model once on a seeded input, eager attention on, and keep what the identities need."""
    blocks = anatomy.blocks
    dense = [block for block in blocks if not block.is_moe]
    moe = [block for block in blocks if block.is_moe]
    read_out = {
        path for b in blocks for path in (b.path, b.o, b.v, b.attention_write, b.mlp_write, b.mlp_norm)
    }
    read_out |= {block.down for block in dense if block.down} | {block.mlp for block in blocks if block.mlp}
    read_out |= {block.experts for block in moe if block.experts}
    read_in = {path for b in blocks for path in (b.path, b.attention_norm, b.mlp_norm)}
    read_in |= {path for b in dense for path in (b.up, b.down) if path}
    read_in |= {path for b in moe for path in (b.mlp, b.experts) if path}
    experts = [block.experts for block in moe if block.experts]
    inputs = _seeded_inputs(model, anatomy)
    with (
        capture(model, sorted(read_out)) as output,
        capture(model, sorted(read_in), inputs=True) as fed,
        capture(model, [block.attention for block in blocks], item=1) as pattern,
        capture(model, experts, inputs=True, item=1) as chosen,
        capture(model, experts, inputs=True, item=2) as routing_weight,
    ):
        answer = model(**inputs)
    return Trace(inputs, getattr(answer, "logits", None), output, fed, pattern, chosen, routing_weight)


def _seeded_inputs(model: Any, anatomy: Anatomy) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    config = model.config
    if anatomy.family == "vision":
        shape = (1, config.num_channels, *image_size(config))
        pixels = torch.randn(shape, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    ids = torch.randint(anatomy.vocab_size, (1, POSITIONS), generator=generator)
    return {"input_ids": ids.to(model.device)}
