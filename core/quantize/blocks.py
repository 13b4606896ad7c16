"""GPTQ on the matrices of a model: who shares inputs is rounded side by side, and what round-to-nearest would have cost
is told beside it.

A step gives it the scheme of every parameter; which methods use it, it does not know.

Legend: ``N`` independent problems (experts; 1 for dense matrices), ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.calibrate.collected import Inputs
from core.calibrate.matrices import Matrix, matrices
from core.calibrate.walk import Collected, walk
from core.models.anatomy import Block
from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme, Scheme
from core.quantize.grid import put, rounded
from core.quantize.stacks import GptqOptions, each, joined, solve
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

WORKING_BYTES = 256 * 2**20
"""Memory that the experts which are rounded together may take."""


@dataclass(frozen=True, eq=False)
class _Stack:
    """Matrices that are rounded together: those of one activation, or all experts' slices of one parameter."""

    targets: tuple[Target, ...]
    of: tuple[tuple[Matrix, ...], ...]
    """[parameter][problem]."""


def quantize_blocks(
    loaded: LoadedModel,
    windows_BP: Tensor,
    schemes: Mapping[str, Scheme],
    options: GptqOptions,
    *,
    progress: Progress,
    scratch: Path | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Put the whole model on its ``schemes`` (parameter → scheme): matrices of blocks by GPTQ, tables to nearest.

    What is not named stays as it is. Gives the lines of ``report.table``, in the model's order, and one line per matrix
    and expert: tokens, damping, loss and round-to-nearest's, and by which of the two it was rounded. Hold ``loaded.lock``.
    """
    todo = targets(loaded)
    of_tables = [target for target in todo if target.layer is None]
    rows = [_put_nearest(loaded, target, schemes.get(target.name)) for target in of_tables]

    def change(block: Block, collected: Collected) -> dict[str, Any]:
        mine = [target for target in todo if target.layer == block.index]
        lines: list[dict[str, Any]] = []
        done: dict[str, dict[str, Any]] = {}
        for stack in _stacks(loaded, block, mine, schemes):
            done |= _quantize_stack(loaded, stack, collected.inputs, schemes, options, lines)
        for target in mine:
            if target.name not in done:
                done[target.name] = _put_nearest(loaded, target, schemes.get(target.name))
        return {"rows": [done[target.name] for target in mine], "layers": lines}

    reports = walk(
        loaded, windows_BP, change, collect=["gram"], progress=progress, scratch=scratch,
        precision=options.precision,
    )  # fmt: skip
    rows += [row for report in reports for row in report["rows"]]
    order = {target.module: index for index, target in enumerate(todo)}
    rows.sort(key=lambda row: order[row["module"]])
    return rows, [line for report in reports for line in report["layers"]]


def _stacks(
    loaded: LoadedModel, block: Block, mine: Sequence[Target], schemes: Mapping[str, Scheme]
) -> Iterator[_Stack]:
    """What GPTQ rounds of a block: matrices on integer grids."""
    target_of = {target.name: target for target in mine}
    todo = [m for m in matrices(loaded, block) if isinstance(schemes.get(m.name), IntegerScheme)]
    dense = sorted((m for m in todo if m.expert is None), key=lambda m: m.inputs)
    for _, together in groupby(dense, key=lambda m: m.inputs):
        parts = tuple(together)
        yield _Stack(tuple(target_of[m.name] for m in parts), tuple((m,) for m in parts))
    for name, experts in groupby((m for m in todo if m.expert is not None), key=lambda m: m.name):
        yield _Stack((target_of[name],), (tuple(experts),))


def _quantize_stack(
    loaded: LoadedModel,
    stack: _Stack,
    inputs: Mapping[str, Inputs],
    schemes: Mapping[str, Scheme],
    options: GptqOptions,
    lines: list[dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Round the matrices of a stack in place; their lines of the report by parameter name."""
    befores = [loaded.model.get_parameter(target.name).data for target in stack.targets]
    nearest = []
    for target, before in zip(stack.targets, befores, strict=True):
        packed = rounded(target, before, schemes[target.name])
        nearest.append(packed if target.layout == "experts" else each(packed, itemgetter(None)))
    found: list[list[PackedTensor]] = []
    for problems in _chunks(stack):
        part = [each(packed, itemgetter(problems)) for packed in nearest]
        of = [of_part[problems] for of_part in stack.of]
        found.append(solve(of, part, [inputs[matrix.inputs] for matrix in of[0]], options, lines))
    rows = {}
    for target, before, parts in zip(stack.targets, befores, zip(*found, strict=True), strict=True):
        packed = joined(parts) if target.layout == "experts" else each(parts[0], itemgetter(0))
        rows[target.name] = _put_in_place(loaded, target, packed, before)
    return rows


def _chunks(stack: _Stack) -> Iterator[slice]:
    """Problems that are solved together, within ``WORKING_BYTES``."""
    n, inputs = len(stack.of[0]), stack.of[0][0].shape[1]
    outputs = sum(of[0].shape[0] for of in stack.of)
    at_once = max(1, WORKING_BYTES // (4 * (4 * inputs * inputs + 6 * inputs * outputs)))
    for first in range(0, n, at_once):
        yield slice(first, min(first + at_once, n))


def _put_nearest(loaded: LoadedModel, target: Target, scheme: Scheme | None) -> dict[str, Any]:
    before = loaded.model.get_parameter(target.name).data
    return _put_in_place(loaded, target, None if scheme is None else rounded(target, before, scheme), before)


def _put_in_place(
    loaded: LoadedModel, target: Target, packed: PackedTensor | None, before: Tensor
) -> dict[str, Any]:
    """``put``, the new values in the memory of the old, which may be the file's: so weights are never held twice."""
    line = put(loaded, target, packed, before)
    parameter = loaded.model.get_parameter(target.name)
    parameter.data = before.copy_(parameter.data)
    return line
