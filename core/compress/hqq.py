"""HQQ: grids fitted to the weights themselves by half-quadratic splitting, without any data."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import Field

from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme
from core.quantize.grid import GridSettings, assign, grid_notes, put, rounded
from core.quantize.grid_fit import Grid, clipped_grid, grouped, half_quadratic
from core.registry import method
from core.saving.report import VIEWS, headline, table, untouched_note
from core.types import Documents, Metric, Progress, Provenance, Result, View

if TYPE_CHECKING:
    from torch import Tensor

FIT_VIEW = View(
    "heatmap", x="layer", y="projection", color="error_left", frame="fits", midpoint=1.0,
    title="Σ|W - Ŵ|^p that is left, of round-to-nearest's", tooltip=("module", "iterations", "error", "error_nearest"),
)  # fmt: skip


class HqqSettings(GridSettings):
    """Which grid, and how it is fitted."""

    p: float = Field(
        default=2.0,
        ge=0.3,
        le=2.0,
        description="Exponent of the weights' error: 2 is the mean square; HQQ's own 0.7 lets outliers hardly count, which "
        "was worse on SmolLM2 at 3 bits",
    )
    refit_scale: bool = Field(
        default=True, description="Fit scales too; off: zero points alone, as the original does"
    )
    clip_steps: int = Field(
        default=0,
        ge=0,
        le=20,
        description="Narrower ranges tried before, each 5 % of the range less; 0: the full range alone. Smaller errors of "
        "weights, but on SmolLM2 at 3 bits a worse model",
    )
    iterations: int = Field(default=10, ge=1, le=200, description="Iterations at most")
    beta: float = Field(
        default=10.0, gt=0, le=1e6, description="Weight of the splitting, differences in steps of the grid"
    )
    kappa: float = Field(default=1.01, ge=1.0, le=2.0, description="Growth of beta per iteration")


@method("compress", title="HQQ", paper="https://mobiusml.github.io/hqq_blog", group="quantize")
def run(
    loaded: LoadedModel, calibration: Documents | None, progress: Progress, settings: HqqSettings
) -> Result:
    """Fit every group's grid to its weights by half-quadratic splitting, instead of spanning their extremes: no data.

    Minimises φ(W - Ŵ) = Σ|W - Ŵ|^p over zero points and scales by half-quadratic splitting: outliers e of the difference
    are set aside by a soft threshold, the grid is fitted to W - e by least squares, and again. HQQ's zero point is a
    float and its scale fixed; files that plain transformers reads hold whole zero points, so zero points are rounded and
    scales fitted to the rounded ones. A group keeps a new grid only where its error, measured as stored, is smaller: the
    error never grows, and no group is worse than round-to-nearest. Symmetric grids (experts) have scales alone.
    """
    started = time.monotonic()
    schemes = assign(loaded, settings)
    todo = targets(loaded)
    rows, fits = [], []
    for done, target in enumerate(todo):
        progress(done, len(todo), f"fitting {target.module}")
        weight, scheme = loaded.model.get_parameter(target.name).data, schemes.get(target.name)
        packed: PackedTensor | None = None
        if isinstance(scheme, IntegerScheme):
            packed, curve = fitted(target, weight, scheme, settings)
            fits.append(_line(target, curve))
        elif scheme is not None:
            packed = rounded(target, weight, scheme)
        rows.append(put(loaded, target, packed, weight))
    frame = table(rows)
    fit_frame = pd.DataFrame(fits).astype({"layer": "Int64"})
    notes = (untouched_note(frame), *grid_notes(todo, schemes.values(), symmetric=settings.grid.symmetric))
    return Result(
        {"main": frame, "fits": fit_frame},
        (FIT_VIEW, *VIEWS),
        (
            Metric("error_left", float(fit_frame["error_left"].mean()), "", "lower", n=len(fit_frame)),
            *headline(frame),
        ),
        Provenance(
            "hqq", settings.model_dump(), loaded.fingerprint, dtype=loaded.dtype, device=loaded.device,
            seconds=time.monotonic() - started,
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip


def fitted(
    target: Target, weight: Tensor, scheme: IntegerScheme, settings: HqqSettings
) -> tuple[PackedTensor, list[float]]:
    """One weight on its fitted grid, and its mean error: round-to-nearest's first, then after every iteration."""
    groups_RGK, nearest = grouped(weight, scheme), Grid.of(rounded(target, weight, scheme))

    def error_of(difference_RGK: Tensor) -> Tensor:
        return difference_RGK.abs().pow(settings.p).sum(-1)

    ratios = [1 - 0.05 * step for step in range(1, settings.clip_steps + 1)]
    grid = clipped_grid(groups_RGK, nearest, error_of, ratios=ratios)
    grid, curve = half_quadratic(
        groups_RGK, grid, p=settings.p, beta=settings.beta, kappa=settings.kappa, iterations=settings.iterations,
        refit_scale=settings.refit_scale,
    )  # fmt: skip
    before = error_of(nearest.values(nearest.codes(groups_RGK)) - groups_RGK).sum()
    return grid.pack(groups_RGK), [float(before) / groups_RGK.numel(), *curve]


def _line(target: Target, curve: list[float]) -> dict[str, object]:
    return {
        "module": target.module,
        "layer": target.layer,
        "projection": target.projection,
        "iterations": len(curve) - 2,
        "error_nearest": curve[0],
        "error": curve[-1],
        "error_left": curve[-1] / curve[0] if curve[0] else 1.0,
    }
