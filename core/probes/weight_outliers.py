"""Weight outliers: the few weights and channels that set everybody else's scale.

Legend: ``O`` outputs, ``I`` inputs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import Field

from core.lazy import torch
from core.probes._provenance import provenance
from core.probes._weight_tensors import Weight, weights
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

GAUSSIAN_KURTOSIS = 3.0


class WeightOutliersSettings(Settings):
    """How many channels to name."""

    top: int = Field(40, ge=1, le=500, description="Channels named in the ranking")

    @property
    def reads_prompt(self) -> bool:
        """Weights are read, no text."""
        return False


def _cost(anatomy: Anatomy, n_tokens: int, settings: WeightOutliersSettings) -> Cost:
    """A dozen passes over all weights."""
    return Cost(12 / max(1, n_tokens), 16 * anatomy.d_model * max(1, anatomy.d_ff))


@method(
    "probe",
    title="Outlier channels",
    paper="https://arxiv.org/abs/2208.07339",
    answers="What can a number hold?",
    examples=(Example("Which channels stand out?", Prompt()),),
    cost=_cost,
)
def weight_outliers(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: WeightOutliersSettings
) -> Result:
    """Find the weights and channels far larger than their neighbours, which take resolution from all others.

    Peak is max|W| / rms: what a scale per matrix must span. Kurtosis is 3 for a Gaussian, more for heavy tails. A channel
    is one row or column of a matrix as it is stored; its ratio is its norm over the median channel's. Small blocks
    shield neighbours from an outlier, a rotation spreads it.
    """
    started = time.perf_counter()
    found = weights(loaded)
    rows, channels = [], []
    gap = 0.0
    with loaded.lock, torch.inference_mode():
        for done, weight in enumerate(found):
            progress(done, len(found), f"reading {weight.name}")
            row, named, off = _describe(weight, settings.top)
            rows.append(row)
            channels += named
            gap = max(gap, off)
    frame = pd.DataFrame(rows)
    ranked = (
        pd.DataFrame(channels).sort_values("ratio", ascending=False, ignore_index=True).head(settings.top)
    )
    inside = frame[frame["layer"].notna()].astype({"layer": int}).reset_index(drop=True)
    worst = frame.sort_values("peak").iloc[-1]
    return Result(
        frames={"ranked": ranked, "main": inside},
        views=_views(),
        metrics=(
            Metric("largest_peak", float(worst["peak"]), "× rms", "lower", n=len(frame)),
            Metric("median_peak", float(frame["peak"].median()), "× rms", "lower", n=len(frame)),
            Metric("median_kurtosis", float(frame["kurtosis"].median()), "", "lower", n=len(frame)),
            Metric(
                "largest_channel_ratio", float(ranked["ratio"].iloc[0]), "× median", "lower", n=len(frame)
            ),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="weight_outliers",
            settings=settings,
            started=started,
            conditions={"weights": len(found)},
            exactness_gap=gap,
            exactness_check="largest |Σ row norms² − Σ column norms²| over the sum, any weight",
        ),
        notes=(
            f"The largest peak is in {worst['name']}.",
            "A Gaussian matrix of a million weights has a peak of about 4.9 and a kurtosis of 3.",
        ),
    )


def _describe(weight: Weight, top: int) -> tuple[dict[str, Any], list[dict[str, Any]], float]:
    """One weight's line, its most prominent channels, and by how much the two sums of squares differ."""
    all_RC = weight.rows(0)
    square_RC = all_RC.double().square()
    row_R, column_C = square_RC.sum(1), square_RC.sum(0)
    total = float(row_R.sum())
    mean_square = total / all_RC.numel()
    peak = float(all_RC.abs().max()) / max(mean_square**0.5, 1e-300)
    kurtosis = float(square_RC.square().mean()) / max(mean_square**2, 1e-300)
    gap = abs(total - float(column_C.sum())) / max(total, 1e-300)
    named = [
        one
        for axis, energy in (("row", row_R), ("column", column_C))
        for one in _channels(weight, axis, energy.sqrt(), top)
    ]
    line = {
        "name": weight.name,
        "layer": weight.layer,
        "part": weight.part,
        "peak": peak,
        "kurtosis": kurtosis,
        "excess_kurtosis": kurtosis - GAUSSIAN_KURTOSIS,
        "largest_channel_ratio": max((one["ratio"] for one in named), default=1.0),
        "rms": mean_square**0.5,
    }
    return line, named, gap


def _channels(weight: Weight, axis: str, norm_X: Tensor, top: int) -> list[dict[str, Any]]:
    """The channels of one axis with the largest norms."""
    median = float(norm_X.median())
    if median == 0:
        return []
    best = norm_X.topk(min(top, len(norm_X)))
    return [
        {
            "channel": f"{weight.name} {axis} {index}",
            "layer": -1 if weight.layer is None else weight.layer,
            "part": weight.part,
            "axis": axis,
            "index": int(index),
            "ratio": float(value) / median,
            "norm": float(value),
        }
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _views() -> tuple[View, ...]:
    tooltip = ("peak", "kurtosis", "largest_channel_ratio", "rms")
    titles = {
        "peak": "max|W| over rms",
        "excess_kurtosis": "kurtosis above a Gaussian's",
        "largest_channel_ratio": "largest channel over the median",
    }
    return (
        View(
            "table", x="channel", color="ratio", frame="ranked", title="Channels by how far they stand out", unit="× median",
            tooltip=("layer", "part", "axis", "index", "norm"),
        ),
        *(
            View("heatmap", x="part", y="layer", color=color, title=f"Layer by weight: {words}", unit="", tooltip=tooltip)
            for color, words in titles.items()
        ),
    )  # fmt: skip
