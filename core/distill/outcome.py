"""What a training came to, in metrics, frames, views and sentences. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.distill.curve import PART, curve_frame, held_out_frame, samples_frame
from core.distill.held_out import HeldOut
from core.distill.trainer import Trained
from core.evaluate._intervals import Bootstrap, Interval
from core.saving.report import VIEWS as TABLE
from core.types import Better, Metric, View

DRAWS = 2000


@dataclass(frozen=True)
class Measure:
    """How a held-out measure is told."""

    title: str
    unit: str
    better: Better


MEASURES: Mapping[str, Measure] = {
    "kl": Measure("KL(teacher ‖ student)", "nats", "lower"),
    "task": Measure("loss of the task", "nats", "lower"),
    "accuracy": Measure("accuracy", "", "higher"),
    "top1_agreement": Measure("same likeliest answer as the teacher", "", "higher"),
}
"""Measures that are known by name; others are told by it."""


def known(name: str) -> Measure:
    """How to tell a measure of this name."""
    return MEASURES.get(name, Measure(name.replace("_", " "), "", "neither"))


def metrics(before: HeldOut, after: HeldOut, *, seed: int) -> tuple[Metric, ...]:
    """Each measure before, after, and the change, with intervals over the same draws of held-out rows."""
    draws = Bootstrap(len(before.n_R), draws=DRAWS, seed=seed, unit="held-out rows")
    found = []
    for name, first_R in before.sums.items():
        last_R, told = after.sums[name], known(name)
        old, new = before.mean(name), after.mean(name)
        found += [
            _metric(f"held_out_{name}_before", old, told, before.n, draws.ratio(first_R, before.n_R)),
            _metric(f"held_out_{name}_after", new, told, after.n, draws.ratio(last_R, after.n_R)),
            _metric(f"held_out_{name}_change", new - old, told, after.n, _difference(draws, before, after, name)),
        ]  # fmt: skip
    return tuple(found)


def frames(trained: Trained, after: HeldOut) -> dict[str, pd.DataFrame]:
    """``curve``, ``held_out``, ``rows`` (each held-out row before and after) and, where any were made, ``samples``."""
    points = trained.curve.points
    samples = samples_frame(points)
    return {
        "curve": curve_frame(points),
        "held_out": held_out_frame(points),
        "rows": _by_row(trained, after),
        **({} if samples.empty else {"samples": samples}),
    }


def views(made: Mapping[str, pd.DataFrame], *, chosen_by: str) -> tuple[View, ...]:
    """How to draw them: what was learned first, then how, then every tensor."""
    told = known(chosen_by)
    found = [
        View("line", x="tokens", y="value", color="measure", frame="held_out", title="On held-out rows",
             unit=told.unit, tooltip=("best",)),
        View("line", x="tokens", y="loss", frame="curve", title="What was minimised, by training token", unit="nats",
             tooltip=("update", "learning_rate", "tokens_per_s")),
        View("line", x="tokens", y="gradient_norm", frame="curve", title="Norm of the gradient, before clipping",
             log=True, tooltip=("update", "learning_rate")),
    ]  # fmt: skip
    parts = [column for column in made["curve"].columns if str(column).startswith(PART)]
    if len(parts) > 1:
        found += [
            View("line", x="tokens", y=part, frame="curve", title=f"Part of the loss: {part.removeprefix(PART)}")
            for part in parts
        ]  # fmt: skip
    if "samples" in made:
        found.append(View("table", x="tokens", text="continuation", frame="samples", title="What it wrote on the way",
                          tooltip=("prompt",)))  # fmt: skip
    return (*found, *TABLE)


def sentences(trained: Trained, after: HeldOut, *, chosen_by: str, seed: int) -> tuple[str, ...]:
    """What was reached, in plain words: how far, on what, by which weights, and why it ended."""
    told, place = known(chosen_by), trained.position
    old, new = trained.before.mean(chosen_by), after.mean(chosen_by)
    draws = Bootstrap(len(after.n_R), draws=DRAWS, seed=seed, unit="held-out rows")
    change = _difference(draws, trained.before, after, chosen_by)
    on = f"{after.n:,} targets of {len(after.n_R):,} held-out rows"
    if not place.best_tokens:
        first = (
            f"Training did not help: on {on}, no weights seen had a smaller {told.title} than the {old:.4g} {told.unit}"
            " they began with, and those are kept."
        )
    else:
        between = "" if change.low is None else f", 95 % interval {change.low:+.3g} to {change.high:+.3g}"
        first = (
            f"{told.title} went from {old:.4g} to {new:.4g} {told.unit} on {on} (change {new - old:+.3g}{between}). Kept "
            f"are the weights after {place.best_tokens:,} of {place.tokens:,} tokens."
        )
    why = {
        "max_tokens": "It ended with max_tokens.",
        "epochs": "It ended when every row had been read as often as epochs says; more rows would let it go on.",
        "patience": f"It stopped early: {place.without_best} measurements in a row brought nothing better.",
    }
    chosen = "The same rows chose the weights; the evaluation, on other text, is the one to believe."
    return (first, why[trained.stopped], chosen, *trained.notes)


def _metric(name: str, value: float, told: Measure, n: int, interval: Interval) -> Metric:
    return Metric(
        name, value, told.unit, told.better, n=n, low=interval.low, high=interval.high, interval=interval.how
    )


def _difference(draws: Bootstrap, before: HeldOut, after: HeldOut, name: str) -> Interval:
    """Interval of the change: both means over the same draws of rows."""

    def change(counts_RD: NDArray[np.int64]) -> NDArray[np.float64]:
        new = (counts_RD @ after.sums[name]) / (counts_RD @ after.n_R)
        old = (counts_RD @ before.sums[name]) / (counts_RD @ before.n_R)
        return np.asarray(new - old)

    return draws.of(change)


def _by_row(trained: Trained, after: HeldOut) -> pd.DataFrame:
    """One line per held-out row: its means before and after."""
    columns = {"row": trained.rows, "n": after.n_R.astype(int)}
    for name, last_R in after.sums.items():
        columns[f"{name}_before"] = trained.before.sums[name] / trained.before.n_R
        columns[f"{name}_after"] = last_R / after.n_R
    return pd.DataFrame(columns)
