"""What a norm feeds and what writes to the residual stream: where a factor can move without changing the model.

A norm's weight multiplies columns of every matrix that reads the norm, and nothing else; so a factor per channel can go
from one to the other, and every matrix of the residual stream can be turned together. This file knows which tensors
those are in every layout; what to do with them is each method's own.

Legend: ``O`` outputs, ``I`` inputs, ``D`` d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import CannotCompress
from core.lazy import torch
from core.models.anatomy import Anatomy, Block, Path
from core.models.experts import is_transposed
from core.models.weights import split_heads
from core.saving.fresh_load import output_of

if TYPE_CHECKING:
    from torch import Tensor

PROBE_TOKENS = 48
EXACT = {"float64": 1e-8, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.3}
"""Largest relative change of a position's logits that is still the rounding of an exact change, by dtype."""


@dataclass(frozen=True)
class Matrix:
    """One matrix, or all experts' at once, by its parameter's name; read and written as [..., O, I]."""

    name: str
    transposed: bool
    """Stored [..., I, O]."""
    bias: str | None
    """The parameter that is added to its outputs, [..., O]."""

    def read(self, model: Any) -> Tensor:
        """The matrix in float64, [..., O, I]."""
        weight: Tensor = model.get_parameter(self.name).data.double()
        return weight.transpose(-1, -2) if self.transposed else weight

    def write(self, model: Any, weight_OI: Tensor) -> None:
        """Put the matrix back in the dtype it had."""
        parameter = model.get_parameter(self.name)
        stored = weight_OI.transpose(-1, -2) if self.transposed else weight_OI
        parameter.data = stored.to(parameter.dtype).contiguous()


@dataclass(frozen=True)
class Fed:
    """A norm and every matrix whose input is that norm's output."""

    norm: Path
    readers: tuple[Matrix, ...]


def fed_by_norms(model: Any, anatomy: Anatomy) -> tuple[Fed, ...]:
    """Every norm whose output is read by matrices alone, in order, the final one last; for pre-norm layers with heads."""
    found = [fed for block in anatomy.blocks for fed in fed_in_block(model, block)]
    if anatomy.final_norm is not None and anatomy.unembedding is not None:
        found.append(Fed(anatomy.final_norm, (linear(model, anatomy.unembedding),)))
    return tuple(found)


def fed_in_block(model: Any, block: Block) -> tuple[Fed, ...]:
    """The block's norms before attention and MLP with their readers; one entry where both read the same norm."""
    by_norm: dict[Path, list[Matrix]] = {}
    if block.has_pattern:
        by_norm.setdefault(block.attention_norm, []).extend(attention_readers(model, block))
    by_norm.setdefault(block.mlp_norm, []).extend(mlp_readers(model, block))
    return tuple(Fed(norm, tuple(readers)) for norm, readers in by_norm.items())


def attention_readers(model: Any, block: Block) -> list[Matrix]:
    """q, k and v, or the one matrix that holds them."""
    return [linear(model, path) for path in dict.fromkeys((block.q, block.k, block.v))]


def mlp_readers(model: Any, block: Block) -> list[Matrix]:
    """Gate and up projections of the MLP; with experts also theirs, the router, and the shared expert and its gate."""
    paths = [block.gate, block.up, block.router, block.shared_gate]
    shared = [f"{block.shared_expert}.{name}" for name in ("gate_proj", "up_proj") if block.shared_expert]
    found = [linear(model, path) for path in (*paths, *shared) if path is not None]
    if block.experts is not None:
        gated = hasattr(model.get_submodule(block.experts), "gate_up_proj")
        found.append(fused(model, block.experts, "gate_up_proj" if gated else "up_proj"))
    return found


def writers(model: Any, block: Block) -> Iterator[Matrix]:
    """The matrices whose outputs are added to the residual stream."""
    yield linear(model, block.o)
    if block.down is not None:
        yield linear(model, block.down)
    if block.experts is not None:
        yield fused(model, block.experts, "down_proj")
    if block.shared_expert is not None:
        yield linear(model, f"{block.shared_expert}.down_proj")


def linear(model: Any, path: Path) -> Matrix:
    """The matrix of a Linear, a Conv1D or a router."""
    module = model.get_submodule(path)
    bias = f"{path}.bias" if getattr(module, "bias", None) is not None else None
    return Matrix(f"{path}.weight", hasattr(module, "nf"), bias)


def fused(model: Any, experts: Path, name: str) -> Matrix:
    """All experts' matrices of one name."""
    module = model.get_submodule(experts)
    bias = f"{name}_bias"
    return Matrix(
        f"{experts}.{name}",
        is_transposed(module),
        f"{experts}.{bias}" if hasattr(module, bias) else None,
    )


def norm_weight(model: Any, anatomy: Anatomy, norm: Path) -> Tensor:
    """What a norm multiplies by, [D], in float64: its weight plus the family's offset."""
    weight: Tensor = model.get_submodule(norm).weight.data.double()
    return weight + anatomy.norm_offset


def set_norm(model: Any, anatomy: Anatomy, norm: Path, weight_D: Tensor, bias_D: Tensor | None) -> None:
    """Make a norm multiply by ``weight_D`` and add ``bias_D``."""
    module = model.get_submodule(norm)
    module.weight.data = (weight_D - anatomy.norm_offset).to(module.weight.dtype)
    if bias_D is not None:
        module.bias.data = bias_D.to(module.bias.dtype)


def scale_out_of_norm(model: Any, anatomy: Anatomy, fed: Fed, scale_D: Tensor) -> None:
    """Divide what the norm gives by ``scale_D`` and multiply its readers' columns by it: the model stays the same."""
    module = model.get_submodule(fed.norm)
    bias = getattr(module, "bias", None)
    scale_D = scale_D.double()
    set_norm(
        model, anatomy, fed.norm, norm_weight(model, anatomy, fed.norm) / scale_D,
        None if bias is None else bias.data.double() / scale_D,
    )  # fmt: skip
    for reader in fed.readers:
        reader.write(model, reader.read(model) * scale_D)


def logits_on_probe(model: Any, anatomy: Anatomy) -> Tensor:
    """The model's outputs on two fixed sequences of tokens, in float64."""
    length = min(PROBE_TOKENS, anatomy.context_length)
    ids = (torch.arange(2 * length) * 7919 + 13) % anatomy.vocab_size
    logits: Tensor = output_of(model, {"input_ids": ids.reshape(2, length).to(model.device)})
    return logits.double()


def exactness_gap(before: Tensor, after: Tensor, *, dtype: str, what: str) -> float:
    """Largest ‖after - before‖ / ‖before‖ of any position; raises ``CannotCompress`` where it is not rounding."""
    gap = float(((after - before).norm(dim=-1) / before.norm(dim=-1)).max().nan_to_num(nan=float("inf")))
    if not gap <= EXACT[dtype]:
        raise CannotCompress(
            f"{what} must not change the model, but its outputs moved by {gap:.2g} of their size: something in it reads "
            "what was changed in a way that is not known here; leave this step out for this architecture"
        )
    return gap


def value_rows(model: Any, anatomy: Anatomy, block: Block) -> tuple[Matrix, Tensor]:
    """The matrix that makes the values, and which of its rows are each key/value head's, [G, K]."""
    values = linear(model, block.v)
    rows = torch.arange(values.read(model).shape[-2], device=model.device)
    return values, split_heads(anatomy, rows[None, None], "v")[0, 0]
