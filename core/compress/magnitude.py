"""Magnitude pruning: the smallest weights become zero, without data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from core.calibrate.matrices import Matrix, matrices
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.registry import method
from core.reshape.mask_step import MaskSettings, check, masked_result, matrix_line, recorded, whole
from core.reshape.sparsity import row_mask, threshold_masks
from core.reshape.zipped import zipped_bytes
from core.types import Cost, Documents, Progress, Result

if TYPE_CHECKING:
    from torch import Tensor


class MagnitudeSettings(MaskSettings):
    """How many weights become zero, in which pattern, and what they are compared with."""

    scope: Literal["row", "matrix", "model"] = Field(
        default="row",
        description="Among which weights the smallest go: of each output, of each matrix, or of all matrices of the model; "
        "a pattern N:M compares within its groups",
    )


@method(
    "compress",
    title="Magnitude pruning",
    paper="https://arxiv.org/abs/1506.02626",
    cost=lambda anatomy, n_tokens, settings: Cost(1),
    left=whole,
    group="prune",
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: MagnitudeSettings
) -> Result:
    """Set the weights of smallest magnitude to zero: the baseline that Wanda and SparseGPT must beat.

    Every matrix of every block, and every single expert, loses the same share (with scope model, all together). The
    file does not shrink: a mask is worth something only with what follows it, and the note says what a zip would weigh.
    Embeddings, routers, norms and biases stay as they are.
    """
    started = time.monotonic()
    check(loaded, settings)
    before = zipped_bytes(loaded.model, "zipped_bytes_before")
    blocks = loaded.anatomy.blocks
    by_block = [matrices(loaded, block) for block in blocks]
    with loaded.lock, torch.inference_mode():
        masks = _masks([matrix for own in by_block for matrix in own], settings)
        reports: list[dict[str, Any]] = []
        for block, own in zip(blocks, by_block, strict=True):
            progress(block.index, len(blocks), f"pruning block {block.index + 1} of {len(blocks)}")
            with recorded(loaded, block) as rows:
                lines = [_zeroed(matrix, next(masks)) for matrix in own]
            reports.append({"rows": rows, "matrices": lines})
    return masked_result(
        loaded,
        settings,
        method="magnitude",
        blocks=reports,
        zipped_before=before,
        seconds=time.monotonic() - started,
    )


def _zeroed(matrix: Matrix, mask_OI: Tensor) -> dict[str, Any]:
    weight_OI = matrix.read().masked_fill_(mask_OI, 0.0)
    matrix.write(weight_OI)
    return matrix_line(matrix, weight_OI)


def _masks(every: list[Matrix], settings: MagnitudeSettings) -> Iterator[Tensor]:
    """Where each matrix becomes zero, one at a time."""
    if settings.scope == "model" and settings.pattern == "unstructured":
        yield from threshold_masks(_Weights(every), settings.share)
        return
    for matrix in every:
        if settings.scope == "matrix" and settings.pattern == "unstructured":
            yield from threshold_masks([matrix.read()], settings.share)
        else:
            yield row_mask(matrix.read().abs(), settings.sparsity)


@dataclass(frozen=True)
class _Weights:
    """The weights of matrices, read each time they are looked at, so that no second copy of all of them is held."""

    of: list[Matrix]

    def __iter__(self) -> Iterator[Tensor]:
        return (matrix.read() for matrix in self.of)
