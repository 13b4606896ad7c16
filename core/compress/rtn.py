"""Round to nearest: weights on integer grids, without data, without search."""

from __future__ import annotations

import time

from core.models.loaded import LoadedModel
from core.models.targets import targets
from core.quantize.grid import GridSettings, assign, grid_notes, put_nearest
from core.registry import method
from core.saving.report import VIEWS, headline, table, untouched_note
from core.types import Cost, Documents, Progress, Provenance, Result


class RtnSettings(GridSettings):
    """Which grid, and how the two big tables are kept."""


@method(
    "compress",
    title="Round to nearest",
    paper="https://arxiv.org/abs/2210.17323",
    cost=lambda anatomy, n_tokens, settings: Cost(1),
)
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: RtnSettings
) -> Result:
    """Put every weight on the nearest point of an integer grid: no data, seconds of work.

    Each group of a row gets one scale (and, affine, a zero point): Ŵ = (round(W / s + z) - z) · s, so that a weight
    moves by about s / 2 at most (``core.numerics.integer`` has the exact bounds). It is near lossless at 8 bits and
    the baseline that data-aware methods must beat at 4
    and below. Norms, biases, routers and position embeddings stay as they are.
    """
    started = time.monotonic()
    schemes = assign(loaded, settings)
    todo = targets(loaded)
    rows = []
    for done, target in enumerate(todo):
        progress(done, len(todo), f"rounding {target.module}")
        rows.append(put_nearest(loaded, target, schemes.get(target.name)))
    frame = table(rows)
    notes = (
        untouched_note(frame),
        *grid_notes(todo, schemes.values(), symmetric=settings.grid.symmetric),
    )
    return Result(
        {"main": frame},
        VIEWS,
        headline(frame),
        Provenance(
            "rtn", settings.model_dump(), loaded.fingerprint, dtype=loaded.dtype, device=loaded.device,
            seconds=time.monotonic() - started,
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip
