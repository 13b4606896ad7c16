"""Weight histogram: one weight matrix laid over the values that a format has.

Legend: ``R`` rows, ``C`` columns, ``V`` values of the format's grid.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.numerics.clipping import clipped, grid_positions, zeroed
from core.numerics.quantize import quantize
from core.numerics.sizes import scheme_bits
from core.probes._provenance import provenance
from core.probes._weight_tensors import Weight, block_of_scheme, chosen_weight, schemes
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel
    from core.numerics.schemes import Scheme

BINS = 161
COMMON = 256
"""Values of a format that are counted one by one; wider formats are only shown as a histogram."""


class WeightHistogramSettings(Settings):
    """Which weight, which format."""

    layer: int = Field(
        -1, ge=-1, le=1024, description="Layer (block index) of the weight; -1: the middle one"
    )
    part: str = Field(
        "",
        max_length=200,
        description="Which of its weights, e.g. q_proj; empty: the last. Or a parameter's or module's whole name, of any layer",
        json_schema_extra={"chosen_from": "weight"},
    )
    format: Literal[
        "float8 e4m3", "float8 e5m2", "int8", "MXFP8 e4m3", "MXFP8 e5m2", "MXFP6 e2m3", "MXFP6 e3m2", "int6", "int5", "int4",
        "MXFP4", "NVFP4", "NF4", "int3", "int2", "ternary",
    ] = Field("MXFP4", description="The format it is laid over")  # fmt: skip
    block: Literal["own", "16", "32", "64", "128", "256", "row"] = Field(
        "own",
        description="Consecutive weights that share a scale; own: 16 for NVFP4, 64 for NF4, 32 for the others. row: one "
        "scale a row, for integers",
    )
    scale_rule: Literal["even", "floor", "ceil"] = Field(
        "even", description="How a microscaling (MX) block's power of two is chosen"
    )
    grid: Literal["symmetric", "affine"] = Field(
        "symmetric", description="Integers: scale only, or scale and zero point"
    )

    @property
    def reads_prompt(self) -> bool:
        """Weights are read, no text."""
        return False


def _cost(anatomy: Anatomy, n_tokens: int, settings: WeightHistogramSettings) -> Cost:
    """Elementwise work on one matrix of one layer."""
    return Cost(60 / (7 * anatomy.n_layers * max(1, n_tokens)), 40 * anatomy.d_model * max(1, anatomy.d_ff))


@method(
    "probe",
    title="A weight over its grid",
    paper="https://arxiv.org/abs/2310.10537",
    answers="What can a number hold?",
    examples=(
        Example("MXFP4 clips with the floor rule", Prompt(), {"scale_rule": "floor"}),
        Example("NF4's values are where weights are", Prompt(), {"format": "NF4"}),
    ),
    cost=_cost,
)
def weight_histogram(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: WeightHistogramSettings
) -> Result:
    """Lay one weight matrix over the values of a format: where weights are, and which values they take.

    Every weight is divided by its own block's scale, so that all blocks share one grid. The first picture is how many
    weights lie where before rounding; the second is the share of weights that each value of the format receives. A
    value that few weights take is a code that was paid for and hardly used; clipped weights lie beyond the last.
    """
    started = time.perf_counter()
    weight = chosen_weight(loaded, settings.layer, settings.part)
    scheme = schemes(settings.block, settings.scale_rule, affine=settings.grid == "affine")[settings.format]
    block = block_of_scheme(scheme)
    if block is not None and weight.columns % block:
        raise BadInput(
            f"blocks of {block} do not divide the rows of {weight.columns} of {weight.name}; choose a block that does, or row"
        )
    with loaded.lock, torch.inference_mode():
        histogram, values, metrics = _read(weight, scheme)
    where = weight.part if weight.layer is None else f"{weight.part} of layer {weight.layer}"
    views = [
        View(
            "line",
            x="position",
            y="share",
            frame="main",
            title=f"{where} before rounding, each block over its scale",
        ),
    ]
    if len(values) <= COMMON:
        views.append(
            View(
                "bar",
                x="value",
                y="share",
                frame="values",
                title=f"After: share on each value of {settings.format}",
            )
        )
    return Result(
        frames={"main": histogram, "values": values},
        views=tuple(views),
        metrics=metrics,
        provenance=provenance(
            loaded,
            prompt,
            method="weight_histogram",
            settings=settings,
            started=started,
            conditions={"weight": weight.name, "rows": weight.n_rows, "columns": weight.columns},
            exactness_gap=abs(float(values["share"].sum()) - 1),
            exactness_check="|Σ share of all values − 1|",
        ),
        notes=(
            "Entropy is what the codes carry: a lossless coder could store them in so many bits each, scales not counted.",
            *loaded.notes,
        ),
    )  # fmt: skip


def _read(weight: Weight, scheme: Scheme) -> tuple[pd.DataFrame, pd.DataFrame, tuple[Metric, ...]]:
    """Where weights lie before and after rounding, and what was lost."""
    rows_RC = weight.rows(0)
    packed = quantize(rows_RC, scheme)
    rounded_RC = packed.dequantize().float()
    noise = float((rounded_RC - rows_RC).double().square().sum())
    energy = float(rows_RC.double().square().sum())
    values = _values(grid_positions(rounded_RC, packed).flatten())
    shares = {
        "relative_error": (noise / energy) ** 0.5 if energy else 0.0,
        "clipped": float(clipped(rows_RC, packed).float().mean()),
        "zeroed": float(zeroed(rows_RC, rounded_RC).float().mean()),
    }
    n = weight.parameters
    bits = scheme_bits((weight.n_rows, weight.columns), scheme)
    metrics = (
        Metric("sqnr", 10 * math.log10(energy / noise) if noise else math.inf, "dB", "higher", n=n),
        *(Metric(name, value, "share", "lower", n=n) for name, value in shares.items()),
        Metric("bits_per_weight", bits, "bits", "lower", n=n),
        Metric("entropy_of_the_codes", _entropy(values["share"].to_numpy()), "bits", "neither", n=n),
    )
    return _histogram(grid_positions(rows_RC, packed).flatten()), values, metrics


def _histogram(positions: Any) -> pd.DataFrame:
    """Share of weights in each of so many equal bins of the grid: columns position (the bin's middle), share."""
    reach = float(positions.abs().max()) or 1.0
    counts = torch.histc(positions, BINS, -reach, reach).double().cpu().numpy()
    edges = np.linspace(-reach, reach, BINS + 1)
    return pd.DataFrame({"position": (edges[1:] + edges[:-1]) / 2, "share": counts / counts.sum()})


def _values(positions: Any) -> pd.DataFrame:
    """Share of weights on each value that is taken: columns value, share."""
    # What was rounded to bfloat16 on the way lies a hair beside its grid point.
    found, counts = torch.unique((positions * 4096).round() / 4096, return_counts=True)
    frame = pd.DataFrame({"value": found.double().cpu().numpy(), "count": counts.cpu().numpy()})
    frame["value"] = frame["value"].map(lambda value: float(f"{value:.3g}") + 0.0)
    totals = frame.groupby("value")["count"].sum().reset_index()
    return totals.assign(share=totals["count"] / totals["count"].sum())[["value", "share", "count"]]


def _entropy(shares: np.ndarray) -> float:
    taken = shares[shares > 0]
    return float(-(taken * np.log2(taken)).sum())
