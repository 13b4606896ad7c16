"""Weight formats: what each number format would leave of the model's weights, layer by layer.

Legend: ``R`` rows, ``C`` columns, ``G`` rows as the independent things of an interval.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.lazy import torch
from core.numerics.clipping import clipped, zeroed
from core.numerics.quantize import quantize
from core.numerics.sizes import scheme_bits
from core.probes._clustered import ratio_half
from core.probes._provenance import provenance
from core.probes._weight_tensors import Weight, block_of_scheme, schemes, weights
from core.registry import Example, Settings, method
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel
    from core.numerics.schemes import Scheme

OPERATIONS = 60
"""Elementwise passes that rounding one weight and measuring it costs, as multiply-adds of a forward pass."""
HEADLINES = ("float8 e4m3", "int8", "MXFP6 e2m3", "int4", "NVFP4", "NF4", "MXFP4", "int3", "ternary")
"""Formats whose SQNR is a headline where they are compared."""
BITS = {"all": range(1, 17), "16": (16,), "8": (8,), "6": (5, 6), "4": (4,), "2 and 3": (2, 3)}


class WeightFormatsSettings(Settings):
    """Which formats, how weights share scales, and how much is read."""

    bits: Literal["all", "16", "8", "6", "4", "2 and 3"] = Field(
        "4", description="Formats of how many bits per value (6: with 5)"
    )
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
    rows: int = Field(
        24, ge=0, le=100_000, description="Evenly spaced rows of each weight that are read; 0 reads all"
    )

    @property
    def reads_prompt(self) -> bool:
        """Weights are read, no text."""
        return False

    def schemes(self) -> dict[str, Scheme]:
        """The formats that are compared."""
        every = schemes(self.block, self.scale_rule, affine=self.grid == "affine")
        return {name: scheme for name, scheme in every.items() if scheme.bits in BITS[self.bits]}


def _cost(anatomy: Anatomy, n_tokens: int, settings: WeightFormatsSettings) -> Cost:
    """Elementwise work on the rows that are read, in forward passes over the tokens."""
    rows = settings.rows or anatomy.d_model
    matrices = anatomy.n_layers * 7
    read = matrices * min(rows, anatomy.d_model) * anatomy.d_model
    whole = matrices * anatomy.d_model * anatomy.d_model
    return Cost(
        OPERATIONS * len(settings.schemes()) * read / (whole * max(1, n_tokens)), 8 * read // matrices * 12
    )


@method(
    "probe",
    title="Formats by layer",
    paper="https://arxiv.org/abs/2310.10537",
    answers="What can a number hold?",
    examples=(
        Example("What if 128 weights shared a scale?", Prompt(), {"block": "128"}),
        Example("And all formats?", Prompt(), {"bits": "all", "rows": 8}),
    ),
    cost=_cost,
)
def weight_formats(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: WeightFormatsSettings
) -> Result:
    """Round the model's own weights to every number format and measure what is left, layer by layer.

    SQNR is 10 log10(Σ W² / Σ (W - Ŵ)²) in dB: 6 dB more is half the error. Clipped weights lie beyond their block's
    largest value, zeroed ones became 0. Rounding to nearest without data: what a method that looks at data (GPTQ, AWQ)
    begins from. The same SQNR hurts some layers more than others; the sensitivity probe says which.
    """
    started = time.perf_counter()
    found, formats = weights(loaded), settings.schemes()
    rows: list[dict[str, Any]] = []
    left_out: set[str] = set()
    with loaded.lock, torch.inference_mode():
        for done, weight in enumerate(found):
            progress(done, len(found), f"rounding {weight.name}")
            rows += _measure(weight, formats, settings.rows, left_out)
    cells = pd.DataFrame(rows)
    whole = not 0 < settings.rows < max(weight.n_rows for weight in found)
    ranked = _pooled(cells, ["format"], formats, interval=not whole)
    ranked = ranked.sort_values("bits_per_weight", ascending=False, ignore_index=True)
    inside = cells[cells["layer"].notna()].astype({"layer": int})
    main = _pooled(inside, ["layer", "format"], formats)
    notes = [
        "Groups and blocks run along the last axis of each weight as it is stored; float8 has one scale a row here."
    ]
    if left_out:
        notes.append(
            "Left out because the block does not divide the row: " + "; ".join(sorted(left_out)) + "."
        )
    return Result(
        frames={"ranked": ranked, "main": main, "parts": _parts(inside, formats)},
        views=_views(),
        metrics=(
            *(
                Metric(
                    f"sqnr_of_{row['format']}", row["sqnr_db"], "dB", "higher", n=int(row["weights"]),
                    low=_or_none(row["low"]), high=_or_none(row["high"]), interval=_HOW if not whole else "",
                )
                for row in ranked[ranked["format"].isin(HEADLINES)].to_dict("records")
            ),
        ),
        provenance=provenance(
            loaded,
            prompt,
            method="weight_formats",
            settings=settings,
            started=started,
            conditions={"weights": len(found), "rows": settings.rows or "all"},
            exactness_gap=None,
            exactness_check="none: rounding is exact by construction; the tests hold it to compressed-tensors, bit for bit",
        ),
        notes=(*notes, *loaded.notes),
    )  # fmt: skip


_HOW = "ratio estimator over the rows that were read, as independent groups, Student's t"


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _measure(
    weight: Weight, formats: dict[str, Scheme], most: int, left_out: set[str]
) -> list[dict[str, Any]]:
    """Sums of one weight under every format, from the rows that are read."""
    rows_RC = weight.rows(most)
    energy_R = rows_RC.double().square().sum(-1)
    fixed = {"layer": weight.layer, "part": weight.part, "component": weight.component}
    out = []
    for name, scheme in formats.items():
        block = block_of_scheme(scheme)
        if block is not None and weight.columns % block:
            left_out.add(f"{name} ({block}) in rows of {weight.columns}")
            continue
        packed = quantize(rows_RC, scheme)
        rounded_RC = packed.dequantize().float()
        noise_R = (rounded_RC - rows_RC).double().square().sum(-1)
        share = weight.n_rows / len(rows_RC)
        out.append(
            {
                **fixed,
                "format": name,
                "noise": float(noise_R.sum()) * share,
                "energy": float(energy_R.sum()) * share,
                "clipped": float(clipped(rows_RC, packed).sum()) * share,
                "zeroed": float(zeroed(rows_RC, rounded_RC).sum()) * share,
                "weights": weight.parameters,
                "bits": scheme_bits((weight.n_rows, weight.columns), scheme) * weight.parameters,
                "half": float(_half(noise_R.cpu().numpy(), energy_R.cpu().numpy())),
            }
        )
    return out


def _half(noise_R: np.ndarray, energy_R: np.ndarray) -> float:
    """Half of the interval of Σ noise / Σ energy over rows."""
    return float(ratio_half(noise_R[:, None], energy_R[:, None])[0]) if energy_R.sum() else 0.0


def _pooled(
    cells: pd.DataFrame, by: list[str], formats: dict[str, Scheme], *, interval: bool = False
) -> pd.DataFrame:
    """Cells added up: SQNR, relative error, clipped and zeroed shares; optionally the interval of the SQNR."""
    sums = ["noise", "energy", "clipped", "zeroed", "weights", "bits"]
    spread = cells.assign(variance=(cells["half"] * cells["energy"]) ** 2)
    pooled = spread.groupby(by, sort=False)[[*sums, "variance"]].sum().reset_index()
    ratio = pooled["noise"] / pooled["energy"]
    pooled["sqnr_db"] = _decibel(ratio)
    pooled["relative_error"] = np.sqrt(ratio)
    pooled["clipped"] /= pooled["weights"]
    pooled["zeroed"] /= pooled["weights"]
    pooled["bits_per_weight"] = pooled["bits"] / pooled["weights"]
    half = np.sqrt(pooled["variance"]) / pooled["energy"]
    pooled["low"] = _decibel(ratio + half) if interval else np.nan
    pooled["high"] = _decibel((ratio - half).clip(lower=ratio / 10)) if interval else np.nan
    order = list(formats)
    if "layer" in by:
        pooled = pooled.sort_values(
            ["layer", "format"], key=lambda c: c.map(order.index) if c.name == "format" else c
        )
    columns = ["sqnr_db", "low", "high", "relative_error", "clipped", "zeroed", "bits_per_weight", "weights"]
    return pooled[[*by, *columns]].reset_index(drop=True)


def _decibel(noise_to_signal: pd.Series) -> pd.Series:
    """10 · log10 of signal over noise; exact weights get the dB of float64's own rounding (about 313)."""
    decibels: pd.Series = -10 * np.log10(noise_to_signal.clip(lower=np.finfo(float).eps ** 2))
    return decibels


def _parts(cells: pd.DataFrame, formats: dict[str, Scheme]) -> pd.DataFrame:
    """The same for every weight of every layer: what one cell of the map is made of."""
    pooled = _pooled(cells, ["layer", "format", "part"], formats)
    return pooled[["layer", "format", "part", "sqnr_db", "relative_error", "clipped", "zeroed", "weights"]]


def _views() -> tuple[View, ...]:
    tooltip = ("sqnr_db", "relative_error", "clipped", "zeroed", "bits_per_weight")
    titles = {
        "sqnr_db": ("SQNR", "dB"),
        "relative_error": ("relative error", "share"),
        "zeroed": ("weights that became 0", "share"),
        "clipped": ("clipped weights", "share"),
    }
    return (
        View(
            "table",
            x="format",
            color="sqnr_db",
            frame="ranked",
            title="What each format leaves of all weights",
            unit="dB",
            tooltip=("bits_per_weight", "low", "high", "relative_error", "clipped", "zeroed"),
        ),
        *(
            View("heatmap", x="format", y="layer", color=color, title=f"Layer by format: {words}", unit=unit, tooltip=tooltip)
            for color, (words, unit) in titles.items()
        ),
        View(
            "table",
            x="format",
            y="layer",
            text="part",
            color="sqnr_db",
            frame="parts",
            title="The weights of one layer in one format",
            unit="dB",
            tooltip=("part", "relative_error", "clipped", "zeroed"),
        ),
        View(
            "scatter",
            x="bits_per_weight",
            y="sqnr_db",
            color="format",
            frame="ranked",
            title="What a bit buys on these weights",
            unit="dB",
            tooltip=("format", "low", "high"),
        ),
    )  # fmt: skip
