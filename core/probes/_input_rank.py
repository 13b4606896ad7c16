"""How much of a layer's input space a text fills: rank and condition of H = XᵀX of what each matrix multiplies.

A quantizer that weighs errors by H, and a pruner that scores by it, knows nothing of directions that no token took.

Legend: ``B`` windows, ``P`` positions, ``I`` columns (inputs of a matrix).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from core.calibrate.collected import Gatherer
from core.calibrate.matrices import Matrix, matrices
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Block
    from core.models.loaded import LoadedModel

WIDEST = 4096
"""Columns up to which the eigenvalues are taken: 0.1 s at 576, 20 s at 4096 on two cores."""
DAMPING = 0.01
"""Share of the mean diagonal that GPTQ adds to it (Frantar et al. 2022); the condition is taken with it."""
NEARLY = 0.99
"""A layer norm takes one direction out of whatever it gives, on any text: so much of the columns is full."""
BATCH_TOKENS = 2048
FULL, SHORT, POOR, UNREAD = "full rank", "fewer tokens than columns", "rank deficient", "too few tokens read"
COLUMNS = ("layer", "input", "columns", "tokens", "rank", "condition", "verdict")


def input_ranks(
    loaded: LoadedModel, windows_BP: Tensor, blocks: Sequence[Block], progress: Progress, *, all_tokens: int
) -> pd.DataFrame:
    """One row per block and activation that dense matrices multiply: ``COLUMNS``.

    ``windows_BP`` are run through the model; ``all_tokens`` is how many a calibrated step would read. Experts are left to
    the count of tokens that reach them, inputs wider than ``WIDEST`` out.
    """
    gram = frozenset(["gram"])
    gathered: list[tuple[Block, Gatherer]] = []
    with loaded.lock, torch.inference_mode(), ExitStack() as hooks:
        for block in blocks:
            found = [m for m in matrices(loaded, block) if m.expert is None and m.shape[1] <= WIDEST]
            gatherer = Gatherer(loaded.model, block, _once(found), gram)  # type: ignore[arg-type]
            hooks.enter_context(gatherer.watching(then=lambda _: None))
            gathered.append((block, gatherer))
        hooks.enter_context(fast_fp32(n_experts=loaded.anatomy.n_experts))
        per_batch = max(1, BATCH_TOKENS // windows_BP.shape[1])
        for done, ids_BP in enumerate(torch.split(windows_BP, per_batch)):
            progress(done * per_batch, len(windows_BP), "reading the windows")
            loaded.model(input_ids=ids_BP, attention_mask=torch.ones_like(ids_BP))
    rows = [
        {
            "layer": block.index,
            "input": path.removeprefix(f"{block.path}."),
            **judged(inputs.gram_II, inputs.n, all_tokens),
        }
        for block, gatherer in gathered
        for path, inputs in gatherer.inputs.items()
        if inputs.n
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _once(found: Sequence[Matrix]) -> list[Matrix]:
    """One matrix of those that read the same activation."""
    return list({matrix.inputs: matrix for matrix in found}.values())


def judged(gram_II: Tensor, n_tokens: int, all_tokens: int) -> dict[str, Any]:
    """Columns, tokens, rank, condition, verdict of one activation.

    The rank counts eigenvalues above float32's rounding of the largest, and is what ``n_tokens`` show.
    """
    columns = len(gram_II)
    values_I = torch.linalg.eigvalsh(gram_II.double())
    top, least = float(values_I[-1]), max(float(values_I[0]), 0.0)
    rank = int((values_I > top * columns * torch.finfo(torch.float32).eps).sum())
    damping = DAMPING * float(values_I.clamp(min=0).mean())
    if rank >= NEARLY * columns:
        verdict = FULL
    elif n_tokens >= columns:
        verdict = POOR
    else:
        verdict = UNREAD if all_tokens >= columns else SHORT
    return {
        "columns": columns,
        "tokens": n_tokens,
        "rank": rank,
        "condition": (top + damping) / (least + damping) if top else np.nan,
        "verdict": verdict,
    }
