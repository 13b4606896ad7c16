"""Which variants are worth keeping: objectives, the Pareto front, and what the intervals allow us to say.

Works on the frame of ``core.catalog.queries.tradeoff_frame``: one row per variant of one base, a column per
headline measurement and its 95 % interval in ``<name>_low`` and ``<name>_high``. It knows nothing of the catalog,
of charts or of how a number was measured. Values stay in their stored units; ``Objective.show`` writes them.

Legend: ``cost`` is a value turned so that lower is better; ``N`` rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from core.errors import BadInput
from core.types import Better

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

Z95 = 1.959964
"""Half-width of a 95 % interval of a normal distribution, in standard deviations."""


@dataclass(frozen=True)
class Objective:
    """One axis a variant can be judged on."""

    column: str
    title: str
    unit: str
    """As shown; ``scale`` stored units make one of them."""
    better: Better
    scale: float = 1.0
    digits: int = 3
    """Significant digits shown."""
    log: bool = False
    """Whether its axis is better read on a log scale."""
    exact: bool = False
    """Counted, not measured: it has no interval because it needs none."""
    group: Literal["size", "quality", "speed", "memory"] = "quality"

    @property
    def label(self) -> str:
        """Title with the unit, as an axis or a table column says it."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def show(self, value: float) -> str:
        """A stored value as text with its unit; a dash when it was not measured."""
        if not np.isfinite(value):
            return "–"
        shown = value / self.scale
        if 0 < abs(shown) < 1e-4:
            mantissa, exponent = f"{shown:.1e}".split("e")
            text = f"{mantissa}e{int(exponent)}"
        elif shown and abs(shown) < 10 ** (self.digits - 1):
            text = f"{shown:.{self.digits}g}"
        else:
            text = f"{shown:,.0f}"
        return f"{text} {self.unit}".strip()


OBJECTIVES: dict[str, Objective] = {
    o.column: o
    for o in (
        Objective("bytes", "Size", "MB", "lower", scale=1e6, log=True, exact=True, group="size"),
        Objective("bits_per_weight", "Bits per weight", "", "lower", log=True, exact=True, group="size"),
        Objective("kl", "KL to base", "nats", "lower", log=True),
        Objective("bits_per_byte", "Bits per byte", "", "lower", digits=4),
        Objective("perplexity", "Perplexity", "", "lower", digits=4, log=True),
        Objective("top1_agreement", "Top-1 agreement", "%", "higher", scale=0.01),
        Objective("accuracy", "Accuracy", "%", "higher", scale=0.01),
        Objective("flips", "Flips", "%", "lower", scale=0.01),
        Objective("cosine_agreement", "Cosine agreement", "", "higher", digits=5),
        Objective("spearman", "Spearman", "", "higher"),
        Objective("prefill_tokens_per_s", "Prefill", "tok/s", "higher", group="speed"),
        Objective("decode_tokens_per_s", "Decode", "tok/s", "higher", group="speed"),
        Objective("images_per_s", "Images", "img/s", "higher", group="speed"),
        Objective("ttft_ms", "TTFT", "ms", "lower", group="speed"),
        Objective("tpot_ms", "TPOT", "ms", "lower", group="speed"),
        Objective("load_ms", "Load", "ms", "lower", group="speed"),
        Objective("peak_memory_bytes", "Peak memory", "MB", "lower", scale=1e6, log=True, group="memory"),
    )
}


def objective(column: str) -> Objective:
    """One objective; raises ``BadInput`` listing the known ones."""
    if column not in OBJECTIVES:
        raise BadInput(f"{column!r} is not an objective; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[column]


def available(frame: pd.DataFrame) -> list[Objective]:
    """The objectives at least one row has a value for, in the order of ``OBJECTIVES``."""
    return [o for o in OBJECTIVES.values() if o.column in frame and frame[o.column].notna().any()]


def usable(frame: pd.DataFrame) -> pd.Series[bool]:
    """Rows one may choose: variants with a reload proof, and the base itself, which was never rewritten."""
    return frame["proven"].astype(bool) | frame["recipe"].isna()


@dataclass(frozen=True)
class Front:
    """The outcome of ``pareto_front``: masks over the frame's index, and how many rows could not take part."""

    on_front: pd.Series[bool]
    judged: pd.Series[bool]
    """Rows that took part: eligible, with a value on both axes."""

    @property
    def excluded(self) -> int:
        """Rows left out for want of a value (or because they were not eligible)."""
        return int((~self.judged).sum())


def pareto_front(frame: pd.DataFrame, x: str, y: str, *, eligible: pd.Series[bool] | None = None) -> Front:
    """Rows no other row beats: at least as good on both axes and better on one. Equal rows stay together.

    Rows without a value on either axis (or not ``eligible``) neither join nor beat anyone. O(N log N).
    """
    cost_x, cost_y = _cost(frame, x), _cost(frame, y)
    judged = np.isfinite(cost_x) & np.isfinite(cost_y)
    if eligible is not None:
        judged &= eligible.to_numpy(dtype=bool)
    on_front = np.zeros(len(frame), dtype=bool)
    on_front[judged] = ~_dominated(cost_x[judged], cost_y[judged], by_x=cost_x[judged], by_y=cost_y[judged])
    return Front(_series(on_front, frame), _series(judged, frame))


def surely_dominated(frame: pd.DataFrame, x: str, y: str, *, delta: float = 0.0) -> pd.Series[bool]:
    """Rows beaten beyond their intervals: another row is better with intervals apart on one axis, and not worse
    on the other by more than the share ``delta`` of this row's value.

    A measured value without an interval cannot be told apart from its neighbour, so it separates nobody.
    """
    axes = [(_cost(frame, column), *_interval(frame, column)) for column in (x, y)]
    judged = np.isfinite(axes[0][0]) & np.isfinite(axes[1][0])
    beaten = np.zeros(len(frame), dtype=bool)
    for (_, low, high), (other, _, _) in (axes, axes[::-1]):
        best_other = _best_before(high[judged], other[judged], low[judged], side="left")
        beaten[judged] |= best_other <= other[judged] + delta * np.abs(other[judged])
    return _series(beaten, frame)


def probability_on_front(
    frame: pd.DataFrame,
    x: str,
    y: str,
    *,
    eligible: pd.Series[bool] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> pd.Series[float]:
    """Share of ``draws`` in which a row is on the front when every value is drawn from its interval.

    Normal approximation: the 95 % interval is ±1.96 standard deviations, rows independent. A value without an
    interval is drawn as itself. Rows that cannot take part are NaN. Rows beaten even four standard deviations in
    their favour are 0 without drawing, which keeps thousands of dominated rows cheap.
    """
    judged = pareto_front(frame, x, y, eligible=eligible).judged.to_numpy()
    means = np.stack([_cost(frame, column)[judged] for column in (x, y)])
    deviations = np.stack([_deviation(frame, column)[judged] for column in (x, y)])
    best_x, best_y = means - 4 * deviations
    worst_x, worst_y = means + 4 * deviations
    contenders = ~_dominated(best_x, best_y, by_x=worst_x, by_y=worst_y)

    random = np.random.default_rng(seed)
    mean, deviation = means[:, contenders], deviations[:, contenders]
    hits = np.zeros(mean.shape[1])
    rounds = draws if deviation.any() else 1
    for _ in range(rounds):
        drawn_x, drawn_y = mean + deviation * random.standard_normal(mean.shape)
        hits += ~_dominated(drawn_x, drawn_y, by_x=drawn_x, by_y=drawn_y)
    share = np.zeros(means.shape[1])
    share[contenders] = hits / rounds
    probability = np.full(len(frame), np.nan)
    probability[judged] = share
    return pd.Series(probability, index=frame.index)


# --- headline figures ---------------------------------------------------------------------------------

QUALITY_TOLERANCE = {"kl": 0.05, "cosine_agreement": 0.99}
"""Quality a headline variant must keep, by the column that measures it (decoders, encoders)."""


@dataclass(frozen=True)
class Headline:
    """One headline figure: the variant that holds it, its value, and the base's value where there is one."""

    variant: str
    name: str
    objective: Objective
    value: float
    base: float
    flagged: bool = False
    """Its speed is of a flagged run, because no usable variant has another; then it is compared with nothing."""

    @property
    def change(self) -> float:
        """Relative change against the base; NaN where the base has no value (or zero)."""
        return self.value / self.base - 1 if self.base and np.isfinite(self.base) else float("nan")


@dataclass(frozen=True)
class Headlines:
    """The row of figures above the chart. A figure is None when no usable variant qualifies."""

    quality: Objective
    tolerance: float
    n_usable: int
    n_within: int
    smallest: Headline | None
    fastest: Headline | None
    closest: Headline | None


def quality_column(frame: pd.DataFrame) -> str:
    """What quality means for this base: KL for decoders, cosine agreement where there is no KL."""
    measured = {o.column for o in available(frame)}
    return "cosine_agreement" if "cosine_agreement" in measured and "kl" not in measured else "kl"


def headlines(frame: pd.DataFrame, *, tolerance: float | None = None) -> Headlines:
    """Smallest and fastest usable variant within the quality ``tolerance``, and the one closest to the base.

    ``tolerance`` is in the unit of ``quality_column``; None takes ``QUALITY_TOLERANCE``. The base itself is
    compared with, never counted. A speed of a flagged run (contention, no steady state …) makes a headline only where
    there is no other, says so, and nothing is compared with one.
    """
    quality = objective(quality_column(frame))
    limit = QUALITY_TOLERANCE[quality.column] if tolerance is None else tolerance
    is_base = frame["recipe"].isna()
    base = frame[is_base].iloc[0] if is_base.any() else pd.Series(dtype=float)
    variants = frame[usable(frame) & ~is_base]
    kept = variants[quality.column] if quality.column in variants else pd.Series(np.nan, index=variants.index)
    within = variants[kept <= limit if quality.better == "lower" else kept >= limit]

    flagged = frame["flagged"] if "flagged" in frame else pd.Series(False, index=frame.index)
    calm = within[~flagged[within.index]]
    if flagged[is_base].any():
        base = base.drop([o.column for o in OBJECTIVES.values() if o.group == "speed"], errors="ignore")

    def best(rows: pd.DataFrame, column: str) -> Headline | None:
        if column not in rows or not rows[column].notna().any():
            return None
        aim = OBJECTIVES[column]
        place = int(np.nanargmin(_cost(rows, column)))
        row = rows.iloc[place]
        doubtful = aim.group == "speed" and bool(flagged.loc[rows.index].iloc[place])
        against = np.nan if doubtful else float(base.get(column, np.nan))
        return Headline(str(row["variant"]), str(row["name"]), aim, float(row[column]), against, doubtful)

    def quickest(rows: pd.DataFrame) -> Headline | None:
        speeds = ("decode_tokens_per_s", "prefill_tokens_per_s", "images_per_s")
        return next((found for column in speeds if (found := best(rows, column))), None)

    return Headlines(
        quality,
        limit,
        len(variants),
        len(within),
        smallest=best(within, "bytes"),
        fastest=quickest(calm) or quickest(within),
        closest=best(variants, quality.column),
    )


# --- the arithmetic -----------------------------------------------------------------------------------


def _cost(frame: pd.DataFrame, column: str) -> Array:
    """The column turned so that lower is better; NaN everywhere when it was never measured."""
    aim = objective(column)
    if column not in frame:
        return np.full(len(frame), np.nan)
    values = frame[column].to_numpy(dtype=float)
    return -values if aim.better == "higher" else values


def _interval(frame: pd.DataFrame, column: str) -> tuple[Array, Array]:
    """Ends of the 95 % interval as costs; infinite where a measured value has none."""
    cost = _cost(frame, column)
    if objective(column).exact:
        return cost, cost
    ends = []
    for end, unknown in (("low", -np.inf), ("high", np.inf)):
        name = f"{column}_{end}"
        values = frame[name].to_numpy(dtype=float) if name in frame else np.full(len(frame), np.nan)
        ends.append(np.where(np.isnan(values), unknown, values))
    low, high = ends
    return (-high, -low) if objective(column).better == "higher" else (low, high)


def _deviation(frame: pd.DataFrame, column: str) -> Array:
    """Standard deviation behind the interval; 0 where there is none."""
    low, high = _interval(frame, column)
    known = np.isfinite(low) & np.isfinite(high)
    return np.where(known, (np.where(known, high, 0) - np.where(known, low, 0)) / (2 * Z95), 0.0)


def _series(mask: Mask, frame: pd.DataFrame) -> pd.Series[bool]:
    return pd.Series(mask, index=frame.index, dtype=bool)


def _best_before(keys: Array, values: Array, queries: Array, *, side: Literal["left", "right"]) -> Array:
    """For each query the lowest value among rows whose key is below it (``right``: or equal); inf if none."""
    order = np.argsort(keys, kind="stable")
    best = np.concatenate([[np.inf], np.minimum.accumulate(values[order])])
    return best[np.searchsorted(keys[order], queries, side=side)]


def _dominated(x: Array, y: Array, *, by_x: Array, by_y: Array) -> Mask:
    """Which points are beaten by at least one of the ``by`` points: no worse on both axes, better on one."""
    better_x = _best_before(by_x, by_y, x, side="left") <= y
    better_y = _best_before(by_x, by_y, x, side="right") < y
    return better_x | better_y
