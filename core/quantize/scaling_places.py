"""Where in a block a factor per channel can be moved into its matrices from what comes before, exactly.

Three kinds: from a norm into all that reads it; from the rows of the value matrix into the columns of the output matrix,
one factor per key/value head and channel, shared by the query heads that read it; from up into down projection, where
the neurons are linear in up (a gate, or ReLU), also inside every expert. Elsewhere (GELU without gate, norms whose
output is added to the stream, values of a Conv1D) there is no such place.

Legend: ``I`` inputs of the readers, ``S`` scales, ``G`` key/value heads, ``K`` channels of a head, ``F`` neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.calibrate.matrices import Matrix, matrices
from core.calibrate.walk import Collected
from core.errors import CannotCompress
from core.lazy import torch
from core.models.anatomy import Anatomy, Block
from core.models.experts import gate_and_up
from core.models.loaded import LoadedModel
from core.quantize.folding import EXACT, fed_in_block, fused, linear, scale_out_of_norm, value_rows
from core.quantize.folding import Matrix as Folded

if TYPE_CHECKING:
    from torch import Tensor

Spread = Callable[["Tensor"], "Tensor"]


def _as_it_is(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, eq=False)
class Place:
    """One source and the matrices that read it."""

    source: str
    """Module that is divided, e.g. the norm's path."""
    readers: tuple[Matrix, ...]
    """Those on a grid; a router that reads it too is scaled in float."""
    divided: tuple[str, int | None, Tensor] | None
    """Parameter, expert and rows [S] of the matrix that is divided; None for a norm."""
    apply: Callable[[Tensor], None]
    """Divide the source by scales [S] and multiply its readers' columns by them."""
    pool: Spread = _as_it_is
    """A statistic per input [I] → per scale [S]."""
    spread: Spread = _as_it_is
    """Scales [S] → one per input [I]."""


@contextmanager
def unchanged(loaded: LoadedModel, block: Block, collected: Collected) -> Iterator[list[float]]:
    """Scales are applied inside; behind it, the list holds how far the block's output moved, relative to its size.

    Raises ``CannotCompress`` where it moved by more than rounding.
    """
    probe_bPD, gaps = collected.stream_BPD[:1], list[float]()
    before_bPD = collected.run(probe_bPD).clone()
    yield gaps
    gaps.append(float((collected.run(probe_bPD) - before_bPD).norm() / before_bPD.norm()))
    if not gaps[0] <= EXACT[loaded.dtype]:
        raise CannotCompress(
            f"folding scales into {block.path} changed its output by {gaps[0]:.2g} of its size: something in it reads what "
            "was scaled in a way that is not known here; choose rtn, hqq or gptq for this architecture"
        )


def places(loaded: LoadedModel, block: Block) -> Iterator[Place]:
    """Every place of a block, in the order in which scales are to be found and applied."""
    model, anatomy = loaded.model, loaded.anatomy
    on_grid = matrices(loaded, block)
    if anatomy.norm_place != "post":
        for fed in fed_in_block(model, block):
            if getattr(model.get_submodule(fed.norm), "weight", None) is None:
                continue
            names = {reader.name for reader in fed.readers}
            readers = tuple(matrix for matrix in on_grid if matrix.name in names)

            def out_of_norm(scale_S: Tensor, fed: Any = fed) -> None:
                scale_out_of_norm(model, anatomy, fed, scale_S)

            yield Place(fed.norm, readers, None, out_of_norm)
    if (
        block.has_pattern and not linear(model, block.v).transposed
    ):  # a Conv1D's groups run along its rows' outputs
        yield _values_place(loaded, block, on_grid)
    yield from _neuron_places(loaded, block, on_grid)


def _values_place(loaded: LoadedModel, block: Block, on_grid: tuple[Matrix, ...]) -> Place:
    model, anatomy = loaded.model, loaded.anatomy
    out = linear(model, block.o)
    heads = [anatomy.kv_head(head) for head in range(anatomy.n_heads)]
    shape = (anatomy.n_kv_heads, anatomy.head_dim)
    values, rows_GK = value_rows(model, anatomy, block)

    def spread(scale_S: Tensor) -> Tensor:
        return scale_S.view(shape)[heads].flatten()

    def pool(statistic_I: Tensor) -> Tensor:
        per_head_HK = statistic_I.view(anatomy.n_heads, anatomy.head_dim)
        summed_GK = statistic_I.new_zeros(shape).index_add_(
            0, torch.tensor(heads, device=statistic_I.device), per_head_HK
        )
        return (summed_GK * anatomy.n_kv_heads / anatomy.n_heads).flatten()

    def apply(scale_S: Tensor) -> None:
        divide_rows(model, values, rows_GK.flatten(), scale_S)
        out.write(model, out.read(model) * spread(scale_S).double())

    readers = tuple(matrix for matrix in on_grid if matrix.name == out.name)
    return Place(block.v, readers, (values.name, None, rows_GK.flatten()), apply, pool, spread)


def _neuron_places(loaded: LoadedModel, block: Block, on_grid: tuple[Matrix, ...]) -> Iterator[Place]:
    model = loaded.model
    pairs = [(block.up, block.down)] if block.gate or loaded.anatomy.activation == "relu" else []
    if block.shared_expert is not None:
        pairs.append((f"{block.shared_expert}.up_proj", f"{block.shared_expert}.down_proj"))
    for up_path, down_path in pairs:
        if up_path is None or down_path is None:
            continue
        up, down = linear(model, up_path), linear(model, down_path)
        rows_F = torch.arange(down.read(model).shape[-1], device=model.device)

        def apply(scale_F: Tensor, up: Folded = up, down: Folded = down, rows_F: Tensor = rows_F) -> None:
            divide_rows(model, up, rows_F, scale_F)
            down.write(model, down.read(model) * scale_F.double())

        readers = tuple(matrix for matrix in on_grid if matrix.name == down.name)
        yield Place(up_path, readers, (up.name, None, rows_F), apply)
    if block.experts is not None and _gates_plainly(model.get_submodule(block.experts), loaded.anatomy):
        yield from _expert_places(model, block.experts, on_grid)


def _gates_plainly(experts: Any, anatomy: Anatomy) -> bool:
    """Whether experts' neurons are act(gate) · up, with gate and up one after the other."""
    probe_D = experts.down_proj.new_zeros(anatomy.d_model)
    return hasattr(experts, "gate_up_proj") and gate_and_up(experts, 0, probe_D) is not None


def _expert_places(model: Any, path: str, on_grid: tuple[Matrix, ...]) -> Iterator[Place]:
    up, down = fused(model, path, "gate_up_proj"), fused(model, path, "down_proj")
    n = down.read(model).shape[-1]
    rows_F = torch.arange(n, 2 * n, device=model.device)
    for matrix in on_grid:
        if matrix.name != down.name or matrix.expert is None:
            continue

        def apply(scale_F: Tensor, expert: int = matrix.expert) -> None:
            divide_rows(model, up, rows_F, scale_F, expert=expert)
            columns = model.get_parameter(down.name).data[expert]
            columns *= (scale_F[:, None] if down.transposed else scale_F).to(columns.dtype)

        yield Place(f"{up.name}[{matrix.expert}]", (matrix,), (up.name, matrix.expert, rows_F), apply)


def divide_rows(
    model: Any, matrix: Folded, rows_S: Tensor, scale_S: Tensor, *, expert: int | None = None
) -> None:
    """Divide some outputs of a matrix, with their biases, by scales."""
    for name, transposed in ((matrix.name, matrix.transposed), (matrix.bias, False)):
        if name is None:
            continue
        stored = model.get_parameter(name).data
        stored = stored if expert is None else stored[expert]
        if transposed:
            stored[:, rows_S] = (stored[:, rows_S].double() / scale_S.double()).to(stored.dtype)
        else:
            factor_S = scale_S.double().view(-1, *[1] * (stored.ndim - 1))
            stored[rows_S] = (stored[rows_S].double() / factor_S).to(stored.dtype)
