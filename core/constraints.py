"""Limits a variant must keep, such as ``≤ 120 MB and ≥ 40 tok/s``: read, check, and say what comes closest.

Units are decimal as everywhere in Slimscope (MB = 10⁶ bytes); MiB and GiB are accepted when written out. Limits
hold on the measured value; ``Verdict.uncertain`` marks rows whose interval reaches across a limit.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from core.errors import BadInput
from core.tradeoff import OBJECTIVES, Objective, objective

Comparison = Literal["<=", "<", ">=", ">"]
_COMPARE = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
_SIGNS = {"<=": "≤", "<": "<", ">=": "≥", ">": ">"}
_WORDS = {"≤": "<=", "=<": "<=", "at most": "<=", "≥": ">=", "=>": ">=", "at least": ">="}
_WORDS |= {"under": "<", "below": "<", "over": ">", "above": ">"} | {sign: sign for sign in _COMPARE}

EXAMPLE = "≤ 120 MB and ≥ 40 tok/s"

_NAMES: dict[str, str] = {
    **{o.title.lower(): o.column for o in OBJECTIVES.values()},
    "kl": "kl",
    "weights": "bytes",
    "bits": "bits_per_weight",
    "bpw": "bits_per_weight",
    "bpb": "bits_per_byte",
    "ppl": "perplexity",
    "top-1": "top1_agreement",
    "cosine": "cosine_agreement",
    "memory": "peak_memory_bytes",
}
"""What people call the objectives; their column names are read too."""
_MEMORY = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_TIME = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_SPEED = {"tok/s": 1.0, "tokens/s": 1.0, "t/s": 1.0}
_IMAGES = {"img/s": 1.0, "images/s": 1.0}
_BARE = {**dict.fromkeys(_MEMORY, "bytes"), **dict.fromkeys(_SPEED, "decode_tokens_per_s")}
_BARE |= dict.fromkeys(_IMAGES, "images_per_s")
_BARE |= {"nats": "kl", "bpw": "bits_per_weight", "bits": "bits_per_weight", "bpb": "bits_per_byte"}
"""The column a unit means when no name was given."""

_CLAUSE = re.compile(
    r"^(?P<name>[a-zµ0-9_ -]*?)\s*"
    rf"(?P<sign>{'|'.join(map(re.escape, sorted(_WORDS, key=len, reverse=True)))})\s*"
    r"(?P<number>\d[\d_]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?P<unit>[a-zµ%/ ]*)$"
)


@dataclass(frozen=True)
class Constraint:
    """One limit on one objective; ``limit`` is in the objective's stored unit (bytes, ms, fraction …)."""

    column: str
    comparison: Comparison
    limit: float

    def __post_init__(self) -> None:
        """Refuse a column that is no objective, an unknown comparison, and a limit that is no number."""
        objective(self.column)
        if self.comparison not in _COMPARE:
            raise BadInput(f"comparison {self.comparison!r} is not one of {', '.join(_COMPARE)}")
        if not np.isfinite(self.limit):
            raise BadInput(f"the limit on {self.column} is {self.limit}; give a finite number")

    @property
    def objective(self) -> Objective:
        """The objective it limits."""
        return objective(self.column)

    def __str__(self) -> str:
        return f"{self.objective.title} {_SIGNS[self.comparison]} {self.objective.show(self.limit)}"

    def holds(self, values: pd.Series[float]) -> pd.Series[bool]:
        """Which values keep the limit; a missing value does not."""
        kept: pd.Series[bool] = _COMPARE[self.comparison](values, self.limit) & values.notna()
        return kept

    @property
    def is_upper(self) -> bool:
        """Whether it limits from above."""
        return self.comparison in ("<=", "<")


def parse_constraints(text: str) -> tuple[Constraint, ...]:
    """Read limits joined by ``and``, ``,`` or ``;``. Empty text is no limit. Raises ``BadInput`` naming the part."""
    parts = [part.strip() for part in re.split(r"\band\b|[,;&]", text.lower()) if part.strip()]
    return tuple(_parse_clause(part) for part in parts)


def _parse_clause(text: str) -> Constraint:
    match = _CLAUSE.match(text)
    if match is None:
        raise BadInput(
            f"constraint {text!r} cannot be read; write a comparison, a number and a unit, e.g. {EXAMPLE}"
        )
    name, sign, unit = (match[part].strip() for part in ("name", "sign", "unit"))
    column = _column(name, unit, text)
    limit = float(match["number"].replace("_", "")) * _factor(column, unit, text)
    return Constraint(column, _WORDS[sign], limit)  # type: ignore[arg-type]


def _column(name: str, unit: str, text: str) -> str:
    if name:
        column = _NAMES.get(name, name)
        if column not in OBJECTIVES:
            raise BadInput(f"constraint {text!r}: {name!r} is not known; choose one of {', '.join(_NAMES)}")
        return column
    if unit not in _BARE:
        said = f"the unit {unit!r} alone does not say what is limited" if unit else "the number has no unit"
        raise BadInput(f"constraint {text!r}: {said}; write e.g. 'TTFT ≤ 200 ms' or '{EXAMPLE}'")
    return _BARE[unit]


def _factor(column: str, unit: str, text: str) -> float:
    """Stored units in one of the written unit."""
    aim = objective(column)
    allowed: dict[str, float] = {"": 1.0, aim.unit.lower(): aim.scale}
    if column.endswith("bytes"):
        allowed = dict(_MEMORY)
    elif column.endswith("_ms"):
        allowed = dict(_TIME)
    elif column.endswith("_per_s"):
        allowed = {"": 1.0, **(_IMAGES if column.startswith("images") else _SPEED)}
    elif column == "bits_per_weight":
        allowed = {"": 1.0, "bits": 1.0, "bpw": 1.0}
    elif column == "bits_per_byte":
        allowed = {"": 1.0, "bpb": 1.0}
    if unit not in allowed:
        said = f"unit {unit!r}" if unit else "no unit"
        choices = ", ".join(u for u in allowed if u)
        raise BadInput(
            f"constraint {text!r}: {said} does not fit {aim.title.lower()}; use {choices or 'none'}"
        )
    return allowed[unit]


# --- checking -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Miss:
    """One limit a variant breaks: its value and by how much, in the stored unit and as a share of the limit."""

    constraint: Constraint
    value: float

    @property
    def excess(self) -> float:
        """Distance beyond the limit in the stored unit."""
        return abs(self.value - self.constraint.limit)

    def __str__(self) -> str:
        aim = self.constraint.objective
        share = f" ({self.excess / abs(self.constraint.limit):.0%})" if self.constraint.limit else ""
        where = "over" if self.constraint.is_upper else "short of"
        limit = aim.show(self.constraint.limit)
        return f"{aim.title} is {aim.show(self.value)}, {aim.show(self.excess)}{share} {where} {limit}"


@dataclass(frozen=True)
class Verdict:
    """Which rows keep every limit, which only just, and the nearest miss when none does."""

    feasible: pd.Series[bool]
    uncertain: pd.Series[bool]
    """Feasible by the measured value, but an interval reaches across a limit."""
    unmeasured: int
    """Rows that lack a limited measurement and so could not be judged."""
    closest: str | None
    """Id of the eligible row that misses by the smallest worst share; None when any row is feasible."""
    closest_name: str
    misses: tuple[Miss, ...]

    def sentence(self) -> str:
        """What the filter found, in one sentence."""
        if self.feasible.any():
            return f"{int(self.feasible.sum())} of {len(self.feasible)} keep every limit."
        if self.closest is None:
            return "Nothing can be judged: no usable variant has all the limited measurements yet."
        return f"No variant keeps every limit. Closest is {self.closest_name}: " + "; ".join(
            map(str, self.misses)
        )


def check(frame: pd.DataFrame, constraints: Sequence[Constraint], *, eligible: pd.Series[bool]) -> Verdict:
    """Apply the limits to a trade-off frame; rows that are not ``eligible`` never count as feasible."""
    feasible, uncertain = eligible.copy(), pd.Series(data=False, index=frame.index)
    measured = pd.Series(data=True, index=frame.index)
    worst = pd.Series(0.0, index=frame.index)
    for limit in constraints:
        values = _numbers(frame, limit.column)
        kept = limit.holds(values)
        feasible &= kept
        measured &= values.notna()
        edge = _numbers(frame, f"{limit.column}_{'high' if limit.is_upper else 'low'}")
        uncertain |= kept & edge.notna() & ~limit.holds(edge)
        share = (values - limit.limit).abs() / (abs(limit.limit) or 1.0)
        worst = worst.where(kept | (worst >= share), share)
    judged = worst[eligible & measured]
    if feasible.any() or judged.empty:
        return Verdict(feasible, uncertain & feasible, int((~measured).sum()), None, "", ())
    row = frame[eligible & measured].iloc[int(judged.to_numpy().argmin())]
    misses = tuple(
        Miss(limit, float(row[limit.column]))
        for limit in constraints
        if not _COMPARE[limit.comparison](row[limit.column], limit.limit)
    )
    closest, name = str(row["variant"]), str(row["name"])
    return Verdict(feasible, uncertain & feasible, int((~measured).sum()), closest, name, misses)


def _numbers(frame: pd.DataFrame, column: str) -> pd.Series[float]:
    if column not in frame:
        return pd.Series(np.nan, index=frame.index)
    return frame[column].astype(float)
