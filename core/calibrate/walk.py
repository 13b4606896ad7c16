"""The one loop of all data-aware steps: a model calibrated block by block, each on what the changed ones before give.

For every block: (1) it runs over all calibration windows while hooks reduce the inputs of its matrices to statistics;
(2) ``change`` edits its weights; (3) it runs again, and what it now gives is what the next block reads. The stream of
all windows is held once, in place, so that peak memory is the model, that stream, the statistics of one block and one
batch's activations. A finished block is kept in ``scratch``; a step that was stopped restores it and only runs it once
more, so that the result is that of an uninterrupted run on the same machine, bit for bit.

Legend: ``B`` windows, ``b`` windows of one batch, ``P`` positions, ``D`` d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.calibrate.block_file import read_block, write_block
from core.calibrate.collected import Gatherer, Inputs, Statistic
from core.calibrate.matrices import matrices
from core.calibrate.stage import TOKENS_AT_ONCE, Enough, Precision, Stage, Tick
from core.calibrate.windows import Sampling
from core.lazy import torch, transformers
from core.models.anatomy import Anatomy, Block
from core.models.fp32_path import fast_fp32
from core.models.loaded import LoadedModel
from core.registry import CostOf
from core.types import Cost, Progress, content_hash, part_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Collected:
    """What a change may know of its block."""

    inputs: Mapping[str, Inputs]
    """By ``Matrix.inputs``; what no token reached has ``n == 0``."""
    stream_BPD: Tensor
    """What the block reads, all windows; not to be written to."""
    run: Callable[[Tensor], Tensor]
    """The block as it is now on streams [b, P, D], e.g. some rows of ``stream_BPD``; differentiable with gradients on."""


Change = Callable[[Block, Collected], Any]
"""Edits the block's parameters and its entries of ``loaded.packed``, nothing else; returns what it reports, as JSON."""


def walk(
    loaded: LoadedModel,
    windows_BP: Tensor,
    change: Change,
    *,
    collect: Iterable[Statistic],
    progress: Progress,
    scratch: Path | None,
    feed: Literal["changed", "original"] = "changed",
    precision: Precision = "float32",
) -> list[Any]:
    """Change every block in turn; what ``change`` reported, by block.

    ``feed`` says whether a block reads what the changed blocks before it give, so that it can make good part of their
    error, or what the original ones gave. ``precision`` is that of the passes over the windows. Hold ``loaded.lock``, without gradients. ``progress`` may raise
    ``Cancelled``; whatever ends a run, blocks in ``scratch`` stay finished. ``scratch`` must be this step's own: that
    text and base are the same is checked, that settings are is the caller's matter.
    """
    blocks, wanted = loaded.anatomy.blocks, frozenset(collect)
    kind = [*sorted(wanted), feed, precision]
    folder = None if scratch is None else _folder(scratch, loaded, windows_BP, kind)
    finished = _finished(folder, blocks)
    reports: list[Any] = []
    with fast_fp32(n_experts=loaded.anatomy.n_experts):
        stage = Stage(loaded, windows_BP, precision=precision)
        for block in blocks:
            ahead = part_of(progress, block.index / len(blocks), (block.index + 1) / len(blocks))
            tick = _ticks(ahead, f"block {block.index + 1} of {len(blocks)}")
            collected = None if block.index in finished else _collect(stage, block, wanted, loaded, tick)
            following = stage.advance(block, tick, in_place=False) if feed == "original" else None
            if collected is None:
                reports.append(read_block(finished[block.index], loaded))
            else:
                reports.append(change(block, collected))
                if folder is not None:
                    write_block(_file(folder, block), loaded, block, reports[-1])
            del collected
            if following is not None:
                stage.stream_BPD = following
            elif block.index + 1 < len(blocks):
                stage.advance(block, tick)
    return reports


def walk_cost(anatomy: Anatomy, settings: Sampling, *, collect: Iterable[Statistic]) -> Cost:
    """What a walk takes: two passes over every window, and memory beside the model.

    XᵀX is counted as half a pass: it is about half as many products as the matrices that read X.
    """
    length = min(settings.sample_tokens, anatomy.context_length)
    gram = "gram" in frozenset(collect)
    stream = settings.samples * length * anatomy.d_model * 4
    batch = (
        max(TOKENS_AT_ONCE, length)
        * (8 * anatomy.d_model + 4 * anatomy.d_ff * max(1, anatomy.experts_per_token))
        * 4
    )
    squares = anatomy.d_model**2 + anatomy.d_ff**2
    grams = (2 * anatomy.d_model**2 + max(1, anatomy.n_experts) * squares) * 4 if gram else 0
    block = (4 * anatomy.d_model**2 + 3 * anatomy.d_model * anatomy.d_ff * max(1, anatomy.n_experts)) * 4
    return Cost(settings.samples * (2 + 0.5 * gram), stream + batch + 2 * grams + block)


def cost_of_walk(*collect: Statistic) -> CostOf:
    """The ``cost`` of a step that is one walk with these statistics."""
    return lambda anatomy, n_tokens, settings: walk_cost(anatomy, settings, collect=collect)


def _collect(
    stage: Stage, block: Block, wanted: frozenset[Statistic], loaded: LoadedModel, tick: Tick
) -> Collected:
    """Run the block over all windows and reduce what its matrices read; behind the last of them it need not go."""
    gatherer = Gatherer(loaded.model, block, matrices(loaded, block), wanted)
    last: list[str] = []

    def stop_behind(path: str) -> None:
        if last and path == last[0]:
            raise Enough

    if wanted:
        with gatherer.watching(then=stop_behind):
            for rows in stage.batches():
                tick(rows.start / len(stage.stream_BPD) / 2)
                with suppress(Enough):
                    stage.run(block, stage.stream_BPD[rows])
                last[:] = [gatherer.last]
    return Collected(gatherer.inputs, stage.stream_BPD, lambda stream_bPD: stage.run(block, stream_bPD))


def _ticks(progress: Progress, said: str) -> Tick:
    return lambda share: progress(share, 1.0, said)


def _folder(scratch: Path, loaded: LoadedModel, windows_BP: Tensor, kind: Sequence[str]) -> Path:
    """The folder of exactly this walk: other text or libraries begin anew."""
    versions = [torch.__version__, transformers.__version__]
    key = content_hash([loaded.fingerprint, windows_BP.tolist(), list(kind), versions, loaded.device])
    folder = scratch / f"walk-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _file(folder: Path, block: Block) -> Path:
    return folder / f"block_{block.index:04}.safetensors"


def _finished(folder: Path | None, blocks: tuple[Block, ...]) -> dict[int, Path]:
    """Files of the first blocks that are finished, without a gap."""
    found: dict[int, Path] = {}
    if folder is not None:
        for block in blocks:
            if not _file(folder, block).exists():
                break
            found[block.index] = _file(folder, block)
    return found
