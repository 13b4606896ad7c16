"""AWQ: channels with large activations get finer steps, by scales folded into what comes before."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import Field

from core.calibrate.walk import Collected, walk, walk_cost
from core.calibrate.windows import Calibration, read_calibration
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.targets import targets
from core.quantize.awq_block import AwqBlock, AwqOptions
from core.quantize.grid import GridSettings, assign, grid_notes, put_nearest
from core.registry import method
from core.saving.report import VIEWS, headline, table, untouched_note
from core.types import Cost, Documents, Metric, Progress, Provenance, Result, View

if TYPE_CHECKING:
    from collections.abc import Mapping

    from core.models.anatomy import Anatomy, Block
    from core.numerics.schemes import Scheme

TOKENS_PER_CANDIDATE = 2048
"""Measured on SmolLM2: rounding all weights once and judging it takes as long as these tokens."""
LOSS_VIEW = View(
    "heatmap", x="layer", y="projection", color="loss_left", frame="losses", midpoint=1.0,
    title="Change of the output on calibration text, of round-to-nearest's",
    tooltip=("module", "expert", "loss_nearest", "loss_scaled", "loss"),
)  # fmt: skip
SCALE_VIEW = View(
    "table", x="source", text="ratio", frame="scales", title="Scales found", tooltip=("loss", "loss_before", "largest"),
)  # fmt: skip


class AwqSettings(GridSettings):
    """Which grid, how scales and ranges are searched, and on which text."""

    scale_steps: int = Field(
        default=20, ge=0, le=100, description="Ratios r = 0, 1/n … 1 tried for scales; 0: no scales"
    )
    duo: bool = Field(
        default=False,
        description="Divide scales by the size of weights too: s = x^r / w^(1 - r) instead of x^r",
    )
    clip_steps: int = Field(
        default=10, ge=0, le=50, description="Narrower ranges tried for every group; 0: no clipping"
    )
    max_shrink: float = Field(
        default=0.5, gt=0, lt=1, description="Share of a group's range that clipping may give up"
    )
    refits: int = Field(
        default=2, ge=0, le=20, description="Least-squares fits of every group's scale after clipping"
    )
    rounding: Literal["nearest", "gptq"] = Field(
        default="nearest", description="How codes are found on those grids: nearest point, or GPTQ"
    )
    damping: float = Field(
        default=0.01, gt=0, le=1, description="Rounding gptq: added to the diagonal of XᵀX, share of its mean"
    )
    samples: int = Field(default=128, ge=1, le=4096, description="Calibration windows")
    sample_tokens: int = Field(
        default=512, ge=16, le=8192, description="Tokens of a window, at most the model's context"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Seed of the choice of windows")


def _cost(anatomy: Anatomy, n_tokens: int, settings: AwqSettings) -> Cost:
    walked = walk_cost(anatomy, settings, collect=["gram", "mean_abs"])
    # Candidates are judged on weights, not on tokens: each takes about as long as so many tokens through the model.
    length = min(settings.sample_tokens, anatomy.context_length)
    searched = (settings.scale_steps + settings.clip_steps) * TOKENS_PER_CANDIDATE / length
    return replace(walked, forwards=walked.forwards + searched)


@method(
    "compress",
    title="AWQ",
    needs=["text", "calibration"],
    paper="https://arxiv.org/abs/2306.00978",
    cost=_cost,
    group="quantize",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: AwqSettings,
) -> Result:
    """Scale input channels by the size of their activations before rounding, then clip: rounding hits what matters least.

    Ŵ = Q(W · s) / s with s = mean|X|^r: the 1 / s is folded exactly into what comes before (norm → q, k, v; values →
    output, per key/value head; norm → gate, up, router; up → down, in every expert too), so files stay plain. r is the
    one of a grid whose error ‖X (Ŵ - W)ᵀ‖² of the layers' own outputs is least over all calibration tokens, by
    H = XᵀX. r = 0 is round-to-nearest, so no layer is worse on that text. Then every group's range is clipped and its
    scale refitted where that moves the outputs less. Blocks go in order, each calibrated on what the ones before give.
    """
    started = time.monotonic()
    schemes = assign(loaded, settings)
    text = read_calibration(loaded, calibration, settings)
    options = AwqOptions(
        settings.scale_steps, settings.duo, settings.clip_steps, settings.max_shrink, settings.refits,
        settings.rounding == "gptq", settings.damping,
    )  # fmt: skip

    def change(block: Block, collected: Collected) -> dict[str, Any]:
        return AwqBlock(loaded, block, collected, schemes, options).run()

    with loaded.lock, torch.inference_mode():
        reports = walk(
            loaded, text.windows_BP, change, collect=["gram", "mean_abs"], progress=progress, scratch=scratch
        )
        rows = [row for report in reports for row in report["rows"]]
        rows += [put_nearest(loaded, t, schemes.get(t.name)) for t in targets(loaded) if t.layer is None]
    return _result(loaded, settings, text, rows, reports, schemes, time.monotonic() - started)


def _result(
    loaded: LoadedModel,
    settings: AwqSettings,
    text: Calibration,
    rows: list[dict[str, Any]],
    reports: list[dict[str, Any]],
    schemes: Mapping[str, Scheme],
    seconds: float,
) -> Result:
    frame, todo = table(rows), targets(loaded)
    losses = pd.DataFrame([line for report in reports for line in report["losses"]]).astype(
        {"expert": "Int64"}
    )
    scales = pd.DataFrame([line for report in reports for line in report["scales"]])
    unreached = int((losses["tokens"] == 0).sum())
    left = float(losses["loss"].sum() / losses["loss_nearest"].sum())
    notes = (
        text.shortage,
        f"{unreached} matrices of experts that no token reached were rounded to nearest."
        if unreached
        else "",
        "A tensor's error is that of rounding: against the weight after scales were folded into it.",
        untouched_note(frame),
        *grid_notes(todo, schemes.values(), symmetric=settings.grid.symmetric),
    )
    return Result(
        {"main": frame, "losses": losses, **({"scales": scales} if len(scales) else {})},
        (LOSS_VIEW, *VIEWS, *([SCALE_VIEW] if len(scales) else [])),
        (
            Metric("output_loss_left", left, "", "lower", n=len(losses)),
            Metric("calibration_tokens", text.n_tokens, "tokens", "higher"),
            *headline(frame),
        ),
        Provenance(
            "awq", settings.model_dump(), loaded.fingerprint, inputs=text.inputs, conditions=text.conditions,
            dtype=loaded.dtype, device=loaded.device, seconds=seconds,
            exactness_gap=max(report["gap"] for report in reports),
            exactness_check="output of each block after folding scales, before rounding, relative",
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip
