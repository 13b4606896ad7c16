"""Layer sensitivity: what each part of each layer costs in each format, alone.

Legend: W windows, P positions.

The table is what a byte budget is spent by (``core.budget.allocation``); it is computed once and kept.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import pandas as pd
from pydantic import Field, field_validator

from core.budget.formats import EXAMPLES, KEEP, read_formats
from core.budget.groups import FileSizes, weight_groups
from core.budget.reruns import INTERVAL, Reruns, bytes_per_token, equal_windows
from core.budget.sensitivity import drops, gradients_of, rank_correlation, table, together
from core.evaluate._intervals import MIN_DOCUMENTS
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._provenance import provenance
from core.registry import Example, Settings, method
from core.text.documents import load_documents
from core.types import Cost, Metric, Progress, Prompt, Result, View, part_of

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

FORMATS = "int2g32, int3g32, int4g32, int6g32, int8, float8"
PARTS_PER_LAYER = 4


class LayerSensitivitySettings(Settings):
    """Which formats, how they are judged, and on what text."""

    formats: str = Field(FORMATS, max_length=400, description=f"Formats to try, e.g. {EXAMPLES}")
    measure: Literal["both", "exact", "fisher"] = Field(
        "both",
        description="exact: KL of the model with that one part stored so; fisher: an estimate of it from one backward "
        "pass, a hundred times cheaper",
    )
    text: str = Field(
        "pydoc", description="Calibration text: pydoc, domains, domain:NAME, a .txt or .jsonl file"
    )
    samples: int = Field(8, ge=2, le=1024, description="Windows of text, each of another document")
    sample_tokens: int = Field(64, ge=8, le=4096, description="Tokens per window")

    @field_validator("formats")
    @classmethod
    def _known(cls, value: str) -> str:
        read_formats(value)
        return value

    @property
    def reads_prompt(self) -> bool:
        """It reads the calibration text."""
        return False


def sensitivity_cost(anatomy: Anatomy, n_tokens: int, settings: LayerSensitivitySettings) -> Cost:
    """Half a forward pass over the windows per part and format, since a rerun begins at the part's own layer."""
    share = settings.samples * settings.sample_tokens / max(1, n_tokens)
    formats = len(read_formats(settings.formats))
    whole = anatomy.n_layers / 2 + 2 * formats + 2
    exact = 0.0 if settings.measure == "fisher" else PARTS_PER_LAYER * formats * anatomy.n_layers / 2
    scores = 0.0 if settings.measure == "exact" else 5.0
    tokens = settings.samples * settings.sample_tokens
    kept = 4 * tokens * (anatomy.n_layers * anatomy.d_model + 3 * anatomy.vocab_size)
    return Cost(share * (exact + scores + whole), kept)


_PROMPT = Prompt("(the calibration text is read; the prompt is not)")


@method(
    "probe",
    title="Layer sensitivity",
    needs=["text"],
    paper="https://arxiv.org/abs/1911.03852",
    answers="What did compression break?",
    examples=(
        Example("Every part in six formats", _PROMPT),
        Example("Seconds instead of minutes: the Fisher score alone", _PROMPT, {"measure": "fisher"}),
        Example("4 bits by group size", _PROMPT, {"formats": "int4g32, int4g64, int4g128, int4"}),
    ),
    cost=sensitivity_cost,
)
def layer_sensitivity(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: LayerSensitivitySettings
) -> Result:
    """Store one part of one layer in one format, leave all else as it is, and measure what that does to the output.

    The loss is KL(as it is ‖ with that part changed) of the next token, in nats per token; for an encoder 1 − cosine of
    the sentence vector. Parts that read one activation are stored alike: q with k and v, gate with up, the experts of a
    layer. Beside the measured loss stands ½ Σ g² ΔW², the same to second order and for independent rounding errors, from
    one backward pass per window with labels drawn from the model; their rank correlation says how far the cheap score
    can be trusted here. Losses of many parts nearly add up while they are small: how nearly, is measured with all parts
    stored alike at once. A budget of bytes is spent by this table on the page Compress.
    """
    started = time.perf_counter()
    documents = load_documents(settings.text, split="calibration")
    formats = {**read_formats(settings.formats), KEEP: None}
    with loaded.lock, fast_fp32(n_experts=loaded.anatomy.n_experts) as path:
        groups = weight_groups(loaded)
        ids_WP = equal_windows(
            loaded, documents, samples=settings.samples, sample_tokens=settings.sample_tokens
        )
        scored = None
        if settings.measure != "exact":
            scored = gradients_of(loaded, groups, ids_WP, part_of(progress, 0.0, 0.1))
        with torch.inference_mode():
            reruns = Reruns(loaded, ids_WP)
            cells = table(
                loaded, groups, lambda group: formats, reruns=None if settings.measure == "fisher" else reruns,
                gradients=scored, progress=part_of(progress, 0.1, 0.9),
            )  # fmt: skip
            frames = {
                "cells": cells,
                "together": together(loaded, groups, formats, reruns, cells),
                "drops": drops(loaded, reruns, part_of(progress, 0.95, 1.0)),
            }
            gap = float(reruns.loss_W(loaded.anatomy.n_layers // 2).max())
    changed = cells[cells["format"] != KEEP]
    unit = "nats" if loaded.family == "decoder" else "1 - cosine"
    ranked = changed.sort_values(
        "fisher" if settings.measure == "fisher" else "loss", ascending=False, ignore_index=True
    )
    n_tokens = int(ids_WP.numel())
    return Result(
        frames={"main": changed.reset_index(drop=True), "ranked": ranked, **frames},
        views=_views(unit, settings),
        metrics=_metrics(frames, n_tokens, unit),
        provenance=provenance(
            loaded, prompt, method="layer_sensitivity", settings=settings, started=started,
            conditions={
                "text": settings.text, "text_fingerprint": documents.fingerprint, "windows": len(ids_WP),
                "tokens": n_tokens, "loss_unit": unit, "bytes_per_token": bytes_per_token(loaded, ids_WP), "fixed_bytes": FileSizes(loaded, groups).fixed,
                "fp32_path": path.name,
            },
            exactness_gap=gap,
            exactness_check="largest loss of a rerun from the middle layer with nothing changed",
        ),
        notes=_notes(loaded, frames, len(ids_WP), int(ids_WP.shape[1])),
    )  # fmt: skip


def _metrics(frames: dict[str, pd.DataFrame], n_tokens: int, unit: str) -> tuple[Metric, ...]:
    cells = frames["cells"]
    correlation = rank_correlation(cells, "loss", "fisher")
    found = []
    if correlation is not None:
        found.append(Metric("fisher_rank_correlation", correlation, "", "higher", n=len(cells)))
    if cells["loss"].notna().any():
        worst = cells.nlargest(1, "loss").to_dict("records")[0]
        low, high = worst["loss_low"], worst["loss_high"]
        found.append(Metric("largest_loss", worst["loss"], unit, "lower", n_tokens, low, high, INTERVAL))
    return tuple(found)


def _notes(
    loaded: LoadedModel, frames: dict[str, pd.DataFrame], windows: int, length: int
) -> tuple[str, ...]:
    notes = [
        f"{windows} windows of {length} tokens, each the beginning of another document; intervals resample documents"
        + ("." if windows >= MIN_DOCUMENTS else f", and need at least {MIN_DOCUMENTS}."),
        "Quantized is round to nearest. A better quantizer lowers the losses, and mostly keeps their order.",
    ]
    correlation = rank_correlation(frames["cells"], "loss", "fisher")
    if correlation is not None:
        notes.append(
            f"The Fisher score ranks the cells as the measured loss does with a rank correlation of {correlation:.3f}."
        )
    if len(frames["together"]):
        rows = frames["together"].to_dict("records")
        said = "; ".join(f"{row['format']} {row['summed']:.3g} against {row['loss']:.3g}" for row in rows)
        notes.append(f"Losses summed over parts against all parts at once: {said}.")
    if loaded.anatomy.n_experts:
        notes.append(
            "A router near a tie sends a token elsewhere after the smallest change: such losses do not shrink with the "
            "square of the error, and the Fisher score does not see them."
        )
    return tuple(notes)


def _views(unit: str, settings: LayerSensitivitySettings) -> tuple[View, ...]:
    tooltip = ("bytes", "bits", "loss_low", "loss_high", "fisher")
    maps = {"loss": "Loss of one part stored so", "fisher": "Fisher score: the same, estimated"}
    if settings.measure != "both":
        del maps["fisher" if settings.measure == "exact" else "loss"]
    first = next(iter(maps))
    views = [
        View(
            "table", x="group", text="format", color=first, frame="ranked", title="Parts and formats, dearest first", unit=unit,
            tooltip=("loss_low", "loss_high", "fisher", "bytes", "bits"),
        ),
        *(
            View("heatmap", x="format", y="group", color=color, title=title, unit=unit, log=True, tooltip=tooltip)
            for color, title in maps.items()
        ),
    ]  # fmt: skip
    if settings.measure == "both":
        views.append(
            View("scatter", x="fisher", y="loss", color="format", title="Estimated against measured", unit=unit,
                 log=True, tooltip=("group", "format"))
        )  # fmt: skip
    return (
        *views,
        View("bar", x="layer", y="loss", frame="drops", title="Loss without the whole layer", unit=unit),
        View(
            "table", x="format", text="groups", color="loss", frame="together", unit=unit, title="Do losses add up?",
            tooltip=("summed", "loss_low", "loss_high"),
        ),
    )  # fmt: skip
