"""Mixed precision: a format for every part of every layer, so that a byte budget costs as little as it can."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import pandas as pd
from pydantic import Field, field_validator

from core.budget.assignment import allocate_readable, read_assignment, read_budget, written
from core.budget.formats import EXAMPLES, KEEP, Format, read_formats
from core.budget.groups import FileSizes, WeightGroup, weight_groups
from core.budget.reruns import INTERVAL, Reruns, equal_windows
from core.budget.sensitivity import gradients_of, table
from core.budget.spending import schemes_of, store_by_gptq, store_in_stages
from core.calibrate.walk import walk_cost
from core.calibrate.windows import read_calibration
from core.errors import BadInput, CannotCompress
from core.models.fp32_path import fast_fp32
from core.models.sizes import Component
from core.quantize.grid import refuse_packed
from core.registry import Settings, method
from core.saving.description import refuse_mixture
from core.saving.report import VIEWS, headline, untouched_note
from core.saving.report import table as report
from core.types import Cost, Documents, Metric, Progress, Provenance, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

FORMATS = "int2g32, int3g32, int4g32, int5g32, int6g32, int8, float8, bfloat16"
STAGES = 8
"""Times the loss is measured while the parts are stored one after the other."""


class MixedPrecisionSettings(Settings):
    """The budget, what may be chosen, and how choices are judged."""

    budget: str = Field(
        "4.5bpw",
        max_length=40,
        description="Bytes of the weight file: 60MB, 1.2GB, or 4.5bpw (bits per weight, every parameter counted); where an "
        "assignment is given, only told",
    )
    formats: str = Field(FORMATS, max_length=400, description=f"Formats a part may get, e.g. {EXAMPLES}")
    score: Literal["fisher", "exact"] = Field(
        "fisher",
        description="What a choice costs: estimated from one backward pass, or the measured KL of each part in each format",
    )
    pins: str = Field(
        "", max_length=20_000, description="Choices made beforehand, e.g. 3.down:int8, embedding:bfloat16"
    )
    assignment: str = Field(
        "",
        max_length=200_000,
        description="Every part's format, as a budget's slider gives it; empty: the best in the budget is searched",
    )
    score_samples: int = Field(
        16,
        ge=2,
        le=1024,
        description="Windows that choices are judged on, each the beginning of another document",
    )
    score_tokens: int = Field(128, ge=8, le=8192, description="Tokens of such a window")
    quantizer: Literal["rtn", "gptq"] = Field(
        "rtn",
        description="rtn: round to nearest; gptq: by GPTQ, on the windows below; choices are judged by rtn",
    )
    samples: int = Field(128, ge=1, le=4096, description="With gptq: calibration windows at most")
    sample_tokens: int = Field(512, ge=16, le=8192, description="With gptq: tokens per window")
    seed: int = Field(0, ge=0, le=1_000_000, description="With gptq: which windows, where the text has more")

    def stored_bits(self, anatomy: Anatomy) -> dict[str, float]:
        """The budget itself, in bits per value of every component. Raises ``BadInput`` where it says nothing of them."""
        if self.assignment or not self.budget.strip().lower().endswith(("bpw", "bit", "bits")):
            raise BadInput("a budget in bytes is the size, and an assignment has its own")
        return dict.fromkeys(get_args(Component), float(read_budget(self.budget, 8000)) / 1000)

    @field_validator("formats")
    @classmethod
    def _known_formats(cls, value: str) -> str:
        read_formats(value)
        return value

    @field_validator("pins", "assignment")
    @classmethod
    def _readable(cls, value: str) -> str:
        read_assignment(value)
        return value

    @field_validator("budget")
    @classmethod
    def _a_size(cls, value: str) -> str:
        read_budget(value, 1)
        return value

    def budgeted_bytes(self, n_parameters: int) -> float:
        """Bytes that the weight files may take; the allocation comes as near as its formats allow."""
        return float(read_budget(self.budget, n_parameters))


def _cost(anatomy: Anatomy, n_tokens: int, settings: MixedPrecisionSettings) -> Cost:
    """Forward passes over the windows that choices are judged on, then GPTQ's; measured scores rerun half the model."""
    parts = 4 * anatomy.n_layers + 2
    tried = 0
    if settings.score == "exact":
        tried = 1 if settings.assignment else len(read_formats(settings.formats))
    tokens = settings.score_samples * min(settings.score_tokens, anatomy.context_length)
    kept = 4 * tokens * (anatomy.n_layers * anatomy.d_model + 3 * anatomy.vocab_size)
    weights = 4 * anatomy.n_layers * (4 * anatomy.d_model**2 + 3 * anatomy.d_model * anatomy.d_ff)
    gradients = 0 if tried else 2 * (weights + 4 * anatomy.vocab_size * anatomy.d_model)
    judged = tokens / max(1, n_tokens) * (6 + STAGES + parts * tried / 2)
    if settings.quantizer == "rtn":
        return Cost(judged, kept + gradients)
    walked = walk_cost(anatomy, settings, collect=["gram"])
    return Cost(judged + walked.forwards, kept + max(gradients, walked.extra_bytes))


@method(
    "compress",
    title="Mixed precision",
    needs=["text", "calibration"],
    paper="https://arxiv.org/abs/1911.03852",
    cost=_cost,
    group="quantize",
)
def run(
    loaded: LoadedModel,
    calibration: Documents | None,
    progress: Progress,
    scratch: Path | None,
    settings: MixedPrecisionSettings,
) -> Result:
    """Spend a budget of bytes where it saves most: every part of every layer gets its own format, chosen exactly.

    Each part (q, k and v together, o, gate and up together, down, the experts of a layer, embedding, head) in each format
    has bytes and a loss: a Fisher estimate of KL(as it is ‖ with that part changed), or that KL measured. The assignment
    with the smallest summed loss whose file fits the budget is found by integer programming, and is optimal among those
    that plain transformers can read. Weights are rounded to nearest, or by GPTQ. While the parts are rounded to nearest one
    after the other, least loss first, the real KL is measured, so that what was predicted can be held against what came.
    """
    assert calibration is not None, "the registry's `needs` bring calibration text"
    started = time.monotonic()
    refuse_packed(loaded)
    groups = weight_groups(loaded)
    offered = _offered(groups, settings)
    ids_WP = equal_windows(
        loaded, calibration, samples=settings.score_samples, sample_tokens=settings.score_tokens
    )
    with fast_fp32(n_experts=loaded.anatomy.n_experts):
        reruns = Reruns(loaded, ids_WP)
        cells = _cells(loaded, groups, offered, ids_WP, reruns, settings, part_of(progress, 0.0, 0.7))
        chosen, promised = _chosen(loaded, groups, cells, settings)
        rest = part_of(progress, 0.7, 1.0)
        shortage = ""
        if settings.quantizer == "gptq":
            text = read_calibration(loaded, calibration, settings)
            shortage = text.shortage
            rows, curve = store_by_gptq(
                loaded,
                groups,
                chosen,
                settings.score,
                reruns,
                text.windows_BP,
                scratch=scratch,
                progress=rest,
            )
        else:
            rows, curve = store_in_stages(
                loaded, groups, chosen, settings.score, reruns, stages=STAGES, progress=rest
            )
    frame = report(rows)
    unit = "nats" if loaded.family == "decoder" else "1 - cosine"
    n_tokens = int(ids_WP.numel())
    notes = (*_notes(chosen, curve, promised, settings, unit), shortage, untouched_note(frame))
    return Result(
        {"main": frame, "parts": chosen, "stages": curve, "cells": cells},
        (*_views(unit), *VIEWS),
        (*_metrics(curve, promised, n_tokens, unit), *headline(frame)),
        Provenance(
            "mixed_precision", settings.model_dump(mode="json"), loaded.fingerprint,
            inputs={"calibration": calibration.fingerprint}, dtype=loaded.dtype, device=loaded.device,
            conditions={
                "calibration": calibration.name, "windows": len(ids_WP), "tokens": n_tokens, "loss_unit": unit,
                "assignment": written(dict(zip(chosen["group"], chosen["format"], strict=True))),
            },
            seconds=time.monotonic() - started,
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip


def _offered(groups: Sequence[WeightGroup], settings: MixedPrecisionSettings) -> dict[str, dict[str, Format]]:
    """Group → the formats it may get: those asked for and its pin; of an assignment, the one that it names."""
    names = [group.name for group in groups]
    given, pins = read_assignment(settings.assignment), read_assignment(settings.pins, "pin")
    for unknown in (name for name in {**given, **pins} if name not in names):
        raise BadInput(f"{unknown!r} is no part of this model; its parts are: {', '.join(names)}")
    if given:
        return {name: read_formats(given.get(name, KEEP)) for name in names}
    wanted = {**read_formats(settings.formats), KEEP: None}
    return {name: {**wanted, **(read_formats(pins[name]) if name in pins else {})} for name in names}


def _cells(
    loaded: LoadedModel, groups: Sequence[WeightGroup], offered: Mapping[str, Mapping[str, Format]], ids_WP: Tensor,
    reruns: Reruns, settings: MixedPrecisionSettings, progress: Progress,
) -> pd.DataFrame:  # fmt: skip
    """The sensitivities that the choice is made by. Raises ``CannotCompress`` where a group can have none of its formats."""
    gradients = None
    if settings.score == "fisher":
        gradients = gradients_of(loaded, groups, ids_WP, part_of(progress, 0.0, 0.5))
    cells = table(
        loaded, groups, lambda group: offered[group.name], reruns=reruns if gradients is None else None,
        gradients=gradients, progress=part_of(progress, 0.5, 1.0),
    )  # fmt: skip
    left_out = set(offered) - set(cells["group"])
    if left_out:
        name = min(left_out)
        raise CannotCompress(
            f"{name} cannot be {', '.join(offered[name])}: its rows do not divide into such groups, or it has experts, which "
            "are stored without zero points; choose another format"
        )
    return cells


def _chosen(
    loaded: LoadedModel, groups: Sequence[WeightGroup], cells: pd.DataFrame, settings: MixedPrecisionSettings
) -> tuple[pd.DataFrame, int]:
    """The rows of the table that were chosen, and the bytes of the file they promise."""
    fixed = FileSizes(loaded, groups).fixed
    if settings.assignment:
        chosen = cells
    else:
        n_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
        best = allocate_readable(
            cells, read_budget(settings.budget, n_parameters), fixed_bytes=fixed, score=settings.score,
            pins=read_assignment(settings.pins, "pin"),
        )  # fmt: skip
        chosen = cells[cells["format"] == cells["group"].map(best.choice_of)].reset_index(drop=True)
    refuse_mixture(loaded, schemes_of(groups, chosen))
    return chosen, int(chosen["bytes"].sum()) + fixed


def _metrics(curve: pd.DataFrame, promised: int, n_tokens: int, unit: str) -> tuple[Metric, ...]:
    last = curve.to_dict("records")[-1]
    return (
        Metric("predicted_loss", last["predicted"], unit, "lower"),
        Metric("measured_loss", last["loss"], unit, "lower", n_tokens, last["loss_low"], last["loss_high"], INTERVAL),
        Metric("promised_bytes", promised, "B", "neither"),
    )  # fmt: skip


def _notes(
    chosen: pd.DataFrame, curve: pd.DataFrame, promised: int, settings: MixedPrecisionSettings, unit: str
) -> tuple[str, ...]:
    last = curve.to_dict("records")[-1]
    bits = chosen.groupby("format", sort=False)["parameters"].sum().sort_values(ascending=False)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in (bits / bits.sum()).items())
    how = "the Fisher score" if settings.score == "fisher" else "the measured losses of its parts"
    asked = "as assigned" if settings.assignment else f"within {settings.budget}"
    stored = f"{promised / 1e6:.2f} MB {asked}. Share of the parts' parameters by format: {shares}."
    came = (
        f"By {how} a loss of {last['predicted']:.4g} {unit} was predicted; on the same calibration text "
        f"{last['loss']:.4g} came. The evaluation measures it on other text."
    )
    return stored, came


def _views(unit: str) -> tuple[View, ...]:
    return (
        View(
            "heatmap", x="part", y="layer", color="bits", text="format", frame="parts",
            title="What each part is stored as", unit="bit", tooltip=("group", "bytes", "loss", "fisher"),
        ),
        View(
            "scatter", x="predicted", y="loss", frame="stages", unit=unit, log=True,
            title="Predicted against measured, part by part", tooltip=("parts", "loss_low", "loss_high"),
        ),
    )  # fmt: skip
