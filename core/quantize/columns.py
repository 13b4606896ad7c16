"""GPTQ's mathematics: weights rounded one input at a time, the error of each made good by the inputs still to come.

With H = XᵀX + λI and U the upper Cholesky factor of H⁻¹, rounding input i leaves the error e = (w_i - ŵ_i) / U_ii, and
every later input j takes w_j -= e · U_ij (https://arxiv.org/abs/2210.17323). The updates inside a run of ``BLOCK`` inputs
are applied at once, those behind it run by run. Grids are fixed before, in the original order of inputs ("static
groups"), so that inputs may be taken in any order.

All matrices that read the same activation share one H and are rounded side by side, and experts of one shape form a
batch. Plain functions of weights, H and grids; knows no model.

Legend: ``N`` independent problems (experts; 1 for dense matrices), ``I`` inputs, ``O`` outputs of all matrices that share
H, ``J`` inputs of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.integer import code_range
from core.quantize.grid_fit import Grid

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
DAMPING_STEPS = (1.0, 10.0, 100.0)
"""What the damping asked for is multiplied by in turn, until H can be factored."""


@dataclass(frozen=True, eq=False)
class Part:
    """The grid of one matrix among those that share H."""

    grid: Grid
    """[N, O, groups]; [N, I, groups] where ``along_outputs``."""
    outputs: int
    group: int
    """Values that share a scale."""
    along_outputs: bool
    """Groups run along the outputs of one input: how a matrix that is stored [in, out] is grouped."""

    def at(self, inputs_NJ: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of every weight of these inputs, float32 [N, J, O]."""
        zero = self.grid.zero_RG
        scale_NJO = self._spread(self.grid.scale_RG.float(), inputs_NJ)
        return scale_NJO, None if zero is None else self._spread(zero, inputs_NJ)

    def _spread(self, numbers: Tensor, inputs_NJ: Tensor) -> Tensor:
        problem_N1 = torch.arange(len(inputs_NJ), device=inputs_NJ.device).unsqueeze(1)
        if self.along_outputs:
            return numbers[problem_N1, inputs_NJ].repeat_interleave(self.group, -1)
        return numbers.mT[problem_N1, inputs_NJ // self.group]


@dataclass(frozen=True, eq=False)
class Rounded:
    """Codes that GPTQ found."""

    codes_NIO: Tensor
    """int8, in the original order of inputs."""
    damping_N: Tensor
    """λ / mean(diag H) that was used; NaN where H could not be factored at any, and the codes mean nothing."""


def gptq(
    weight_NIO: Tensor, gram_NII: Tensor, parts: Sequence[Part], *, damping: float, act_order: bool
) -> Rounded:
    """Round weights [N, I, O], the outputs of ``parts`` side by side, given XᵀX of their inputs.

    ``act_order`` takes inputs by falling Σ x²: what matters most is rounded while most others can still make it good. An
    input that was always 0 is rounded to nearest.
    """
    n, inputs, _ = weight_NIO.shape
    diagonal_NI = gram_NII.diagonal(dim1=-2, dim2=-1)
    order_NI = (
        torch.argsort(diagonal_NI, dim=-1, descending=True, stable=True)
        if act_order
        else torch.arange(inputs, device=weight_NIO.device).expand(n, -1)
    )
    factor_NII, damping_N = inverse_factor(_reordered(gram_NII, order_NI), damping=damping)
    left_NIO = weight_NIO.gather(1, order_NI.unsqueeze(-1).expand_as(weight_NIO))
    codes_NIO = torch.empty_like(left_NIO, dtype=torch.int8)
    low_O, high_O = _ranges(parts, weight_NIO.device)
    for first in range(0, inputs, BLOCK):
        run = slice(first, min(first + BLOCK, inputs))
        grids = [part.at(order_NI[:, run]) for part in parts]
        scale_NJO = torch.cat([scale for scale, _ in grids], -1)
        zeros = [torch.zeros_like(scale) if zero is None else zero for scale, zero in grids]
        error_NJO = _round_run(
            left_NIO[:, run], factor_NII[:, run, run], (scale_NJO, torch.cat(zeros, -1)), (low_O, high_O),
            codes_NIO[:, run],
        )  # fmt: skip
        left_NIO[:, run.stop :].baddbmm_(factor_NII[:, run, run.stop :].mT, error_NJO, alpha=-1)
    original_NIO = torch.empty_like(codes_NIO).scatter_(
        1, order_NI.unsqueeze(-1).expand_as(codes_NIO), codes_NIO
    )
    return Rounded(original_NIO, damping_N)


def inverse_factor(gram_NII: Tensor, *, damping: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of (H + λI)⁻¹, and λ / mean(diag H) by problem: raised tenfold, twice, where it must be.

    Where H still cannot be factored, the factor is the identity and the damping NaN.
    """
    n, inputs, _ = gram_NII.shape
    mean_N = gram_NII.diagonal(dim1=-2, dim2=-1).mean(-1)
    factor_NII = torch.eye(inputs, device=gram_NII.device).repeat(n, 1, 1)
    used_N = torch.full((n,), torch.nan, device=gram_NII.device)
    for step in DAMPING_STEPS:
        todo_N = used_N.isnan().nonzero().flatten()
        if not len(todo_N):
            break
        damped_MII = gram_NII[todo_N]
        diagonal_MI = damped_MII.diagonal(dim1=-2, dim2=-1)
        # An input that was always 0 has no error to pass on: any positive number stands for it.
        diagonal_MI += (diagonal_MI == 0).float() + damping * step * mean_N[todo_N].unsqueeze(-1)
        lower_MII, failed_M = torch.linalg.cholesky_ex(damped_MII)
        inverse_MII = torch.cholesky_inverse(lower_MII)
        upper_MII, again_M = torch.linalg.cholesky_ex(inverse_MII, upper=True)
        good_M = (failed_M == 0) & (again_M == 0) & upper_MII.isfinite().all(-1).all(-1)
        factor_NII[todo_N[good_M]] = upper_MII[good_M]
        used_N[todo_N[good_M]] = damping * step
    return factor_NII, used_N


def _round_run(
    left_NJO: Tensor,
    factor_NJJ: Tensor,
    grid: tuple[Tensor, Tensor],
    ranges: tuple[Tensor, Tensor],
    codes_NJO: Tensor,
) -> Tensor:
    """Round a run of inputs in turn, writing codes; what each leaves behind, divided by U_ii: [N, J, O]."""
    (scale_NJO, zero_NJO), (low_O, high_O) = grid, ranges
    error_NJO = torch.empty_like(left_NJO)
    diagonal_NJ1 = factor_NJJ.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    for j in range(left_NJO.shape[1]):
        weight_NO, scale_NO, zero_NO = left_NJO[:, j], scale_NJO[:, j], zero_NJO[:, j]
        code_NO = (weight_NO / scale_NO).add_(zero_NO).clamp_(low_O, high_O).round_()
        codes_NJO[:, j] = code_NO
        error_NO = torch.addcmul(weight_NO, code_NO.sub_(zero_NO), scale_NO, value=-1).div_(
            diagonal_NJ1[:, j]
        )
        error_NJO[:, j] = error_NO
        left_NJO[:, j + 1 :].addcmul_(factor_NJJ[:, j, j + 1 :, None], error_NO.unsqueeze(1), value=-1)
    return error_NJO


def _reordered(gram_NII: Tensor, order_NI: Tensor) -> Tensor:
    rows = gram_NII.gather(1, order_NI.unsqueeze(-1).expand_as(gram_NII))
    return rows.gather(2, order_NI.unsqueeze(1).expand_as(gram_NII))


def _ranges(parts: Sequence[Part], device: torch.device) -> tuple[Tensor, Tensor]:
    """Smallest and largest code of every output, [O] each."""
    limits = [code_range(part.grid.scheme.bits) for part in parts]
    outputs = torch.tensor([part.outputs for part in parts], device=device)
    low_O, high_O = (
        torch.tensor(side, dtype=torch.float32, device=device).repeat_interleave(outputs)
        for side in zip(*limits, strict=True)
    )
    return low_O, high_O
