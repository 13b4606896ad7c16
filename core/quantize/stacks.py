"""GPTQ on matrices of one shape and one activation, judged against rounding to nearest.

It sees matrices, the statistics of what they read, and round-to-nearest's packed forms; it changes no model.

Legend: ``N`` independent problems (experts; 1 for dense matrices), ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from core.calibrate.collected import Inputs
from core.calibrate.matrices import Matrix
from core.calibrate.stage import Precision
from core.lazy import torch
from core.numerics.packed import PackedTensor
from core.quantize.columns import Part, gptq
from core.quantize.grid_fit import Grid, grouped
from core.quantize.scale_search import fit_to_inputs

if TYPE_CHECKING:
    from torch import Tensor

GPTQ = "gptq"
CLIP_STEPS, MAX_SHRINK, REFITS = 6, 0.3, 2
"""How grids are fitted: ranges down to 0.7 of the full one, in steps of 0.05, then scales by least squares."""


@dataclass(frozen=True)
class GptqOptions:
    """How codes are found."""

    damping: float
    act_order: bool
    fit_grid: bool
    precision: Precision = "float32"
    """Of the passes over the calibration windows."""


def solve(
    of: Sequence[tuple[Matrix, ...]], nearest: Sequence[PackedTensor], seen: Sequence[Inputs], options: GptqOptions,
    lines: list[dict[str, Any]],
) -> list[PackedTensor]:  # fmt: skip
    """GPTQ on problems that share a shape, each kept where it beats round-to-nearest: each part's packed form, [N, …]."""
    gram_NII = torch.stack([_gram(inputs, of[0][0]) for inputs in seen])
    weights = [torch.stack([matrix.read() for matrix in own]) for own in of]
    parts = [_part(own[0], packed, w, gram_NII, fit=options.fit_grid)
             for own, packed, w in zip(of, nearest, weights, strict=True)]  # fmt: skip
    weight_NIO = torch.cat([weight_NOI.mT for weight_NOI in weights], -1)
    result = gptq(weight_NIO, gram_NII, parts, damping=options.damping, act_order=options.act_order)
    del weight_NIO
    chosen = []
    for own, packed, weight_NOI, part, codes_NIO in zip(
        of,
        nearest,
        weights,
        parts,
        torch.split(result.codes_NIO, [p.outputs for p in parts], -1),
        strict=True,
    ):
        rounded_ = _packed(codes_NIO if part.along_outputs else codes_NIO.mT, part.grid)
        loss_N = _loss(rounded_, weight_NOI, part, gram_NII)
        nearest_N = _loss(packed, weight_NOI, part, gram_NII)
        power_N = _output_power(weight_NOI, gram_NII)
        outcomes = [
            _outcome(*facts)
            for facts in zip(
                seen, result.damping_N.tolist(), loss_N.tolist(), nearest_N.tolist(), strict=True
            )
        ]
        by_gptq_N = torch.tensor([outcome == GPTQ for outcome in outcomes], device=loss_N.device)
        chosen.append(_where(by_gptq_N, rounded_, packed))
        kept_N = torch.where(by_gptq_N, loss_N, nearest_N)
        for n, matrix in enumerate(own):
            never = int((gram_NII[n].diagonal() == 0).sum())
            losses = (float(kept_N[n]), float(nearest_N[n]), float(power_N[n]))
            lines.append(_line(matrix, seen[n].n, never, float(result.damping_N[n]), losses, outcomes[n]))
    return chosen


def _part(matrix: Matrix, nearest: PackedTensor, weight_NOI: Tensor, gram_NII: Tensor, *, fit: bool) -> Part:
    """One matrix's grid for every problem: round-to-nearest's, or one that moves the outputs less."""
    grid = Grid.of(nearest)
    if fit:
        found = [_fitted(grid, n, weight_OI, gram_NII[n], matrix) for n, weight_OI in enumerate(weight_NOI)]
        zeros = [one.zero_RG for one in found if one.zero_RG is not None]
        scale = torch.stack([one.scale_RG for one in found])
        grid = replace(grid, scale_RG=scale, zero_RG=torch.stack(zeros) if zeros else None)
    outputs, inputs = matrix.shape
    return Part(
        grid, outputs, grid.scheme.group_size or (outputs if matrix.transposed else inputs), matrix.transposed
    )


def _fitted(grid: Grid, n: int, weight_OI: Tensor, gram_II: Tensor, matrix: Matrix) -> Grid:
    one = replace(grid, scale_RG=grid.scale_RG[n], zero_RG=None if grid.zero_RG is None else grid.zero_RG[n])
    groups_RGK = grouped(weight_OI.T if matrix.transposed else weight_OI, grid.scheme)
    found, _ = fit_to_inputs(
        groups_RGK, one, gram_II, transposed=matrix.transposed, clip_steps=CLIP_STEPS, max_shrink=MAX_SHRINK,
        refits=REFITS,
    )  # fmt: skip
    return found


def _gram(inputs: Inputs, matrix: Matrix) -> Tensor:
    """XᵀX; 0 where no token reached the matrix."""
    if inputs.n:
        return inputs.gram_II
    return torch.zeros(matrix.shape[1], matrix.shape[1], device=matrix.read().device)


def _loss(packed: PackedTensor, weight_NOI: Tensor, part: Part, gram_NII: Tensor) -> Tensor:
    """Σ ‖x (Ŵ - W)ᵀ‖² over the tokens of each problem, with Ŵ as it will be read back: [N]."""
    after = packed.dequantize().float()
    return _output_power((after.mT if part.along_outputs else after) - weight_NOI, gram_NII)


def _output_power(weight_NOI: Tensor, gram_NII: Tensor) -> Tensor:
    """Σ ‖x Wᵀ‖² = tr(W H Wᵀ): [N]."""
    return ((weight_NOI @ gram_NII) * weight_NOI).sum((1, 2)).clamp(min=0)


def _outcome(inputs: Inputs, damping: float, loss: float, nearest: float) -> str:
    if not inputs.n:
        return "nearest: no token reached it"
    if math.isnan(damping):
        return "nearest: XᵀX could not be factored"
    return GPTQ if loss <= nearest else "nearest: it moved the outputs less"


def _line(
    matrix: Matrix, tokens: int, never: int, damping: float, losses: tuple[float, float, float], outcome: str
) -> dict[str, Any]:
    """One matrix of the report; losses are per token, ``relative_loss`` of the power of its outputs."""
    loss, nearest, power = losses
    return {
        "module": matrix.module,
        "expert": matrix.expert,
        "layer": matrix.layer,
        "projection": matrix.projection,
        "component": matrix.component,
        "tokens": tokens,
        "inputs_never_active": never,
        "damping": None if math.isnan(damping) else damping,
        "loss": loss / max(1, tokens),
        "loss_nearest": nearest / max(1, tokens),
        "loss_left": loss / nearest if nearest else 1.0,
        "relative_loss": loss / power if power else 0.0,
        "rounded_by": outcome,
    }


def _packed(codes: Tensor, grid: Grid) -> PackedTensor:
    zero = None if grid.zero_RG is None else grid.zero_RG.to(torch.int8)
    return PackedTensor(codes.contiguous(), grid.scale_RG, zero, grid.scheme)


def each(packed: PackedTensor, cut: Callable[[Tensor], Tensor]) -> PackedTensor:
    """The same cut of codes, scales and zero points."""
    assert packed.scale is not None, "an integer grid has scales"
    zero = None if packed.zero_point is None else cut(packed.zero_point)
    return replace(packed, codes=cut(packed.codes), scale=cut(packed.scale), zero_point=zero)


def _where(choice_N: Tensor, ours: PackedTensor, theirs: PackedTensor) -> PackedTensor:
    """Problem by problem one or the other."""
    choice_N11 = choice_N.view(-1, 1, 1)
    assert ours.scale is not None
    assert theirs.scale is not None
    zero = None
    if ours.zero_point is not None and theirs.zero_point is not None:
        zero = torch.where(choice_N11, ours.zero_point, theirs.zero_point)
    codes, scale = (
        torch.where(choice_N11, a, b) for a, b in ((ours.codes, theirs.codes), (ours.scale, theirs.scale))
    )
    return replace(ours, codes=codes, scale=scale, zero_point=zero)


def joined(parts: Sequence[PackedTensor]) -> PackedTensor:
    """Problems one behind the other."""
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    scales = [part.scale for part in parts if part.scale is not None]
    codes = torch.cat([part.codes for part in parts])
    return replace(
        parts[0], codes=codes, scale=torch.cat(scales), zero_point=torch.cat(zeros) if zeros else None
    )
