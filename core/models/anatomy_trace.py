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
    scores: dict[str, Tensor]
    """Routing weights [T, E] of routers whose experts are not called with them (Llama-4)."""


@dataclass(frozen=True)
class Check:
    """One identity at one module: two tensors [T, …] that must be equal, bit for bit when ``exact``."""

    name: str
    module: str
    got: Tensor
    expected: Tensor
    exact: bool = False


def trace_seeded(model: Any, anatomy: Anatomy) -> Trace:
    """Run the model once on a seeded input, eager attention on, and keep what the identities need."""
    blocks = anatomy.blocks
    dense = [block for block in blocks if not block.is_moe]
    moe = [block for block in blocks if block.is_moe]
    attending = [block for block in blocks if block.has_pattern]
    read_out = {path for b in blocks for path in (b.path, b.attention_write, b.mlp_write, b.mlp_norm)}
    read_out |= {path for b in attending for path in (b.o, b.v)}
    read_out |= {block.down for block in dense if block.down} | {block.mlp for block in blocks if block.mlp}
    read_out |= {block.experts for block in moe if block.experts}
    read_in = {path for b in blocks for path in (b.path, b.attention_norm, b.mlp_norm)}
    read_in |= {path for b in dense for path in (b.up, b.down) if path}
    read_in |= {path for b in moe for path in (b.mlp, b.experts) if path}
    experts = {block.experts: block.router for block in moe if block.experts and block.router}
    decided = [path for path in experts if hasattr(model.get_submodule(path), "_apply_gate")]
    scoring = [router for path, router in experts.items() if path not in decided]
    inputs = _seeded_inputs(model, anatomy)
    with (
        capture(model, sorted(read_out)) as output,
        capture(model, sorted(read_in), inputs=True) as fed,
        capture(model, [block.attention for block in attending], item=1) as pattern,
        capture(model, decided, inputs=True, item=1) as chosen,
        capture(model, decided, inputs=True, item=2) as routing_weight,
        capture(model, scoring) as scores,
    ):
        answer = model(**inputs)
    return Trace(
        inputs, getattr(answer, "logits", None), output, fed, pattern, chosen, routing_weight, scores
    )


def _seeded_inputs(model: Any, anatomy: Anatomy) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    config = model.config
    if anatomy.family == "vision":
        shape = (1, config.num_channels, *image_size(config))
        pixels = torch.randn(shape, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    ids = torch.randint(anatomy.vocab_size, (1, POSITIONS), generator=generator)
    return {"input_ids": ids.to(model.device)}
