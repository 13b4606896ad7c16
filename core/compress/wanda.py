"""Wanda: zeros where a weight times the norm of its input is smallest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.calibrate.matrices import matrices
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
from core.reshape.sparsity import row_mask, wanda_scores
from core.reshape.zipped import zipped_bytes
from core.types import Documents, Progress, Result

if TYPE_CHECKING:
    from core.models.anatomy import Block


class WandaSettings(CalibratedMaskSettings):
    """How many weights become zero, in which pattern, and the text they are judged on."""


@method(
    "compress",
    title="Wanda",
    needs=["text", "calibration"],
    paper="https://arxiv.org/abs/2306.11695",
    cost=cost_of_walk("sum_squares"),
    left=whole,
    group="prune",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: WandaSettings,
) -> Result:
    """Set to zero, in every row of every matrix, the weights of smallest |W_ij| · ‖X_j‖₂: pruning by weights and inputs.

    ‖X_j‖₂ is the norm of input j over calibration tokens; an expert's is over the tokens routed to it. The weights that
    stay are not changed. Blocks are pruned in order, each judged on what the pruned ones before it give. The file does
    not shrink: a mask is worth something only with what follows it, and the note says what a zip would weigh.
    """
    started = time.monotonic()
    check(loaded, settings)
    text = read_calibration(loaded, calibration, settings)
    before = zipped_bytes(loaded.model, "zipped_bytes_before")
    sparsity = settings.sparsity

    def prune(block: Block, collected: Collected) -> dict[str, Any]:
        lines, unreached = [], 0
        with recorded(loaded, block) as rows:
            for matrix in matrices(loaded, block):
                weight_OI, seen = matrix.read(), collected.inputs[matrix.inputs]
                unreached += not seen.n
                scores_OI = wanda_scores(weight_OI, seen.sum_squares_I) if seen.n else weight_OI.abs()
                weight_OI.masked_fill_(row_mask(scores_OI, sparsity), 0.0)
                matrix.write(weight_OI)
                lines.append(matrix_line(matrix, weight_OI))
        return {"rows": rows, "matrices": lines, "unreached": unreached}

    with loaded.lock, torch.inference_mode():
        reports = walk(
            loaded, text.windows_BP, prune, collect=["sum_squares"], progress=progress, scratch=scratch
        )
    return masked_result(
        loaded, settings, method="wanda", blocks=reports, zipped_before=before, seconds=time.monotonic() - started,
        notes=[
            text.shortage,
            unreached_note(sum(report["unreached"] for report in reports)),
        ],
        inputs=text.inputs, conditions=text.conditions,
    )  # fmt: skip
