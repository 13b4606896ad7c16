"""The weight matrices of a block as [out, in] matrices, each with the activation that multiplies it.

One view for every data-aware method: a linear layer, a transposed Conv1D and one expert of a fused tensor look alike.
Routers, norms, biases and embeddings are no matrices here. It reads and writes weights; it runs nothing.

Legend: ``O`` outputs, ``I`` inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from core.lazy import torch
from core.models.anatomy import Block
from core.models.experts import is_transposed
from core.models.loaded import LoadedModel
from core.models.sizes import Component
from core.models.targets import Layout, Target, projection_of, targets

if TYPE_CHECKING:
    from torch import Tensor

READ_TOGETHER: tuple[frozenset[str], ...] = (
    # A latent attention's first projections read the block's hidden state as q, k and v do elsewhere.
    frozenset({"q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"}),
    frozenset({"query", "key", "value"}),
    frozenset({"gate_proj", "up_proj"}),
)
"""Modules of one parent that multiply the same activation, by name (held by a test on every family)."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix product of a block."""

    name: str
    """Of its parameter, as in ``model.named_parameters()``."""
    expert: int | None
    """Which slice of a fused parameter; None for a parameter of its own."""
    layer: int
    component: Component
    layout: Layout
    inputs: str
    """Name of the activation that it multiplies; matrices that read the same one share it."""
    transposed: bool
    """Whether it is stored [in, out]."""
    _model: Any = field(repr=False)

    @property
    def module(self) -> str:
        """Module path, or the fused parameter's own name: the key of ``LoadedModel.packed``."""
        return self.name.removesuffix(".weight")

    @property
    def projection(self) -> str:
        """What it is called within its block."""
        return projection_of(self.module)

    @property
    def label(self) -> str:
        """How a reader is told of it."""
        return self.module if self.expert is None else f"{self.module}[{self.expert}]"

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self._stored.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def read(self) -> Tensor:
        """W [O, I] in float32, a copy."""
        weight = self._stored.T if self.transposed else self._stored
        return weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def write(self, weight_OI: Tensor) -> None:
        """Put W [O, I] in its place, rounded to the parameter's dtype."""
        self._stored.copy_(weight_OI.T if self.transposed else weight_OI)

    @property
    def _stored(self) -> Tensor:
        data: Tensor = self._model.get_parameter(self.name).data
        return data if self.expert is None else data[self.expert]


def matrices(loaded: LoadedModel, block: Block) -> tuple[Matrix, ...]:
    """Every matrix of a block, in the model's order; a fused expert tensor gives one per expert."""
    mine = [
        t for t in targets(loaded) if t.layer == block.index and t.layout in ("linear", "conv1d", "experts")
    ]
    first: dict[tuple[str, frozenset[str]], str] = {}
    return tuple(matrix for target in mine for matrix in _of_target(loaded.model, block, target, first))


def _of_target(
    model: Any, block: Block, target: Target, first: dict[tuple[str, frozenset[str]], str]
) -> Iterator[Matrix]:
    assert target.layer is not None, "matrices are inside blocks"
    fixed = (target.layer, target.component, target.layout)
    if target.layout != "experts":
        parent, _, name = target.module.rpartition(".")
        together = next((names for names in READ_TOGETHER if name in names), frozenset({name}))
        inputs = first.setdefault((parent, together), target.module)
        yield Matrix(target.name, None, *fixed, inputs, target.layout == "conv1d", model)
        return
    experts = model.get_submodule(str(block.experts))
    for expert in range(len(model.get_parameter(target.name))):
        inputs = expert_inputs(str(block.experts), expert, neurons=is_down(target.name))
        yield Matrix(target.name, expert, *fixed, inputs, is_transposed(experts), model)


def is_down(name: str) -> bool:
    """Whether a fused parameter multiplies the experts' neurons, not their tokens."""
    return "down" in name.rpartition(".")[2]


def expert_inputs(experts: str, expert: int, *, neurons: bool) -> str:
    """The name of what one expert's matrix multiplies: the tokens routed to it, or its neurons on them."""
    return f"{experts}[{expert}].{'neurons' if neurons else 'tokens'}"
