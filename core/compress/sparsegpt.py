"""SparseGPT: zeros where they cost least, and the other weights changed to make them good."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from core.calibrate.matrices import Matrix, matrices
from core.calibrate.walk import Collected, cost_of_walk, walk
from core.calibrate.windows import read_calibration
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.registry import method
from core.reshape.mask_step import (
    CalibratedMaskSettings,
    check,
    masked_result,
    matrix_line,
    recorded,
    unreached_note,
    whole,
)
from core.reshape.sparsity import output_error, row_mask, sparsegpt
from core.reshape.zipped import zipped_bytes
from core.saving.storable import storable
from core.types import Documents, Progress, Result

if TYPE_CHECKING:
    from torch import Tensor

    from core.calibrate.collected import Inputs
    from core.models.anatomy import Block


class SparseGptSettings(CalibratedMaskSettings):
    """How many weights become zero, in which pattern, and the text they are judged on."""

    damping: float = Field(
        default=0.01,
        gt=0,
        le=1,
        description="Added to the diagonal of XᵀX before it is inverted, as a share of its mean",
    )


@method(
    "compress",
    title="SparseGPT",
    needs=["text", "calibration"],
    paper="https://arxiv.org/abs/2301.00774",
    cost=cost_of_walk("gram"),
    left=whole,
    group="prune",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: SparseGptSettings,
) -> Result:
    """Prune each matrix column by column, and let the columns that are still to come make good what is lost.

    With U the upper factor of (XᵀX + λI)⁻¹, the weights of smallest W² / U_ii² go, compared over all rows of a block of
    128 columns; removing W_ij changes row i by −(W_ij / U_jj) · U_j. Blocks of the model are pruned in order, each judged
    on what the pruned ones before it give. An expert is judged on the tokens routed to it. The file does not shrink: a
    mask is worth something only with what follows it, and the note says what a zip would weigh.
    """
    started = time.monotonic()
    check(loaded, settings)
    text = read_calibration(loaded, calibration, settings)
    before = zipped_bytes(loaded.model, "zipped_bytes_before")

    as_stored = storable(loaded)

    def prune(block: Block, collected: Collected) -> dict[str, Any]:
        with recorded(loaded, block) as rows:
            pruned = [
                _pruned(matrix, collected.inputs[matrix.inputs], settings, as_stored)
                for matrix in matrices(loaded, block)
            ]
        return {
            "rows": rows,
            "matrices": [line for line, _ in pruned],
            "damping": [used for _, used in pruned],
        }

    with loaded.lock, torch.inference_mode():
        reports = walk(loaded, text.windows_BP, prune, collect=["gram"], progress=progress, scratch=scratch)
    return masked_result(
        loaded, settings, method="sparsegpt", blocks=reports, zipped_before=before, seconds=time.monotonic() - started,
        notes=[
            text.shortage, *_damping_notes(reports, settings.damping),
        ],
        inputs=text.inputs, conditions=text.conditions,
    )  # fmt: skip


def _pruned(
    matrix: Matrix, seen: Inputs, settings: SparseGptSettings, as_stored: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Any], float | None]:
    """Prune one matrix in place; its line of the report, and its damping: 0 unseen by any token, None not invertible."""
    weight_OI = matrix.read()
    if not seen.n:
        after_OI = weight_OI.masked_fill(row_mask(weight_OI.abs(), settings.sparsity), 0.0)
        matrix.write(after_OI)
        return matrix_line(matrix, after_OI), 0.0
    gram_II = seen.gram_II
    after_OI, used = sparsegpt(weight_OI, gram_II, settings.sparsity, damping=settings.damping)
    after_OI = as_stored(after_OI)
    matrix.write(after_OI)
    error = output_error(weight_OI, after_OI, gram_II)
    return matrix_line(matrix, after_OI, output_error=error), None if math.isnan(used) else used


def _damping_notes(reports: Sequence[Mapping[str, Any]], wanted: float) -> list[str]:
    """Which matrices went another way."""
    used = [damping for report in reports for damping in report["damping"]]
    singular = sum(damping is None for damping in used)
    raised = [damping for damping in used if damping is not None and damping > wanted * 1.001]
    return [
        unreached_note(sum(damping == 0 for damping in used)),
        f"{singular} matrices, whose XᵀX cannot be inverted, were pruned by magnitude." if singular else "",
        f"Damping was raised up to {max(raised):g} in {len(raised)} of {len(used)} matrices."
        if raised
        else "",
    ]
