"""GPTQ: weights rounded so that what each error does to a layer's outputs is made good by the weights after it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from core.calibrate.stage import Precision
from core.calibrate.walk import cost_of_walk
from core.calibrate.windows import read_calibration
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.targets import targets
from core.quantize.blocks import quantize_blocks
from core.quantize.grid import GridSettings, assign, grid_notes
from core.quantize.stacks import GPTQ, GptqOptions
from core.registry import method
from core.saving.layout import refuse_fused_on_disk
from core.saving.report import VIEWS, headline, table, untouched_note
from core.types import Documents, Metric, Progress, Provenance, Result, View


class GptqSettings(GridSettings):
    """Which grid, how codes are found, and on how much text."""

    act_order: bool = Field(
        default=True,
        description="Round the inputs that are largest on the text first; scales stay those of the original order",
    )
    damping: float = Field(
        default=0.01, gt=0, le=1, description="Added to the diagonal of XᵀX, as a share of its mean"
    )
    fit_grid: bool = Field(
        default=False,
        description="First clip each group's range, and refit its scale, where that moves the layer's outputs less",
    )
    precision: Precision = Field(
        default="float32",
        description="Of the passes over the text: bfloat16 takes about 0.6 of the time where the processor has it",
    )
    samples: int = Field(default=128, ge=1, le=4096, description="Calibration windows at most")
    sample_tokens: int = Field(
        default=512, ge=16, le=8192, description="Tokens per window, at most the context length"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="Which windows, where the text has more")


@method(
    "compress",
    title="GPTQ",
    needs=["text", "calibration"],
    paper="https://arxiv.org/abs/2210.17323",
    cost=cost_of_walk("gram"),
    group="quantize",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: GptqSettings,
) -> Result:
    """Round weights input by input; the weights still to come move so that the layer's outputs stay where they were.

    Minimises ‖X (Ŵ - W)ᵀ‖² over calibration text: after input i of a row is rounded with error e, every later input j
    takes −e · [H⁻¹]_ij / [H⁻¹]_ii, H = XᵀX + λI. Blocks are done in order, each on what the rounded ones before it give. An
    expert is rounded on the tokens routed to it. A matrix that no token reached, whose H cannot be factored, or that
    rounding to nearest would have moved less, is rounded to nearest, and said so. Embedding and head are rounded to
    nearest on their own bits.
    """
    started = time.monotonic()
    schemes = assign(loaded, settings)
    refuse_fused_on_disk(loaded, schemes)
    text = read_calibration(loaded, calibration, settings)
    options = GptqOptions(settings.damping, settings.act_order, settings.fit_grid, settings.precision)
    with loaded.lock, torch.inference_mode():
        rows, lines = quantize_blocks(
            loaded, text.windows_BP, schemes, options, progress=progress, scratch=scratch
        )
    frame, layers = table(rows), layer_table(lines)
    notes = (
        *layer_notes(layers, settings.damping),
        text.shortage,
        untouched_note(frame),
        *grid_notes(targets(loaded), schemes.values(), symmetric=settings.grid.symmetric),
    )
    return Result(
        {"main": frame, "layers": layers},
        (LAYER_VIEW, *VIEWS),
        (*layer_metrics(layers, text.n_tokens), *headline(frame)),
        Provenance(
            "gptq", settings.model_dump(mode="json"), loaded.fingerprint,
            inputs=text.inputs, conditions=text.conditions, dtype=loaded.dtype, device=loaded.device,
            seconds=time.monotonic() - started,
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip


LAYER_VIEW = View(
    "heatmap", x="layer", y="projection", color="loss_left", frame="layers", midpoint=1.0,
    title="Loss of a layer's outputs, of rounding to nearest's",
    tooltip=("module", "expert", "tokens", "damping", "loss", "loss_nearest", "rounded_by"),
)  # fmt: skip


def layer_table(lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per matrix and expert."""
    frame = pd.DataFrame(list(lines))
    return frame.astype({"layer": "Int64", "expert": "Int64", "damping": "Float64"})


def layer_metrics(layers: pd.DataFrame, n_tokens: int) -> tuple[Metric, ...]:
    """Totals over all matrices."""
    n = len(layers)
    return (
        Metric("layer_loss", float(layers["loss"].sum()), "", "lower", n=n),
        Metric("layer_loss_nearest", float(layers["loss_nearest"].sum()), "", "lower", n=n),
        Metric("matrices_rounded_to_nearest", int((layers["rounded_by"] != GPTQ).sum()), "", "lower", n=n),
        Metric("calibration_tokens", n_tokens, "tokens", "higher"),
    )


def layer_notes(layers: pd.DataFrame, damping: float) -> tuple[str, ...]:
    """What a reader must know of matrices that went another way."""
    n, why = len(layers), layers["rounded_by"].value_counts()
    fallbacks = [
        f"{count} because {str(reason).removeprefix('nearest: ')}"
        for reason, count in why.items()
        if reason != "gptq"
    ]
    raised = layers[layers["damping"] > damping * 1.001]
    return (
        f"{sum(why.drop(GPTQ, errors='ignore'))} of {n} matrices were rounded to nearest: {', '.join(fallbacks)}."
        if fallbacks
        else "",
        f"Damping was raised up to {raised['damping'].max():g} in {len(raised)} of {n} matrices, whose XᵀX could not be "
        "factored with less."
        if len(raised)
        else "",
    )
