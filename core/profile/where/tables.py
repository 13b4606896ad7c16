"""The three tables that say where the time goes, made from the spans of repeated steps, and two models side by side.

Pure: spans go in, frames come out, whatever runtime they came from.

``modules`` has one row per phase and module:

- phase: ``prefill``, ``decode`` or ``forward``; module: its path, empty for the whole model; layer (Int64); component
  (``core.models.sizes.Component``); kind: its class; depth: 0 for the whole model
- calls: per step; total_ms: median over the steps, with what it calls, between total_low_ms and total_high_ms (95 %
  order statistics; NaN where the steps are too few); self_ms: without what it calls; share: of the step, self, 0–1

``operators`` has one row per phase, module and operator:

- phase, module, layer, component as above; module is empty where the runtime does not say which part asked for it
- operator: the runtime's name, e.g. ``aten::addmm`` or ``MatMulNBits``; calls: per step; traced_ms: per step, itself
  only, with a profiler looking on and so not a timing; share: of all operators of the phase, 0–1

``events`` has one row per span of one step of each phase:

- phase, name, category (``module`` or ``operator``), module, start_us and duration_us since the phase's start,
  depth; ``trace.chrome_trace(events)`` makes them a file for Perfetto

``joined`` (``join_modules(a, b)``) has one row per phase and module of two models, by path:

- phase, module, layer, component, kind_a, kind_b, depth; total and self of both in ms; difference_ms: self, b − a;
  ratio: total, b / a; only_in: ``a``, ``b`` or empty
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from core.profile.quantiles import quantile
from core.profile.where.spans import Span

MODULES = (
    *("phase", "module", "layer", "component", "kind", "depth", "calls"),
    *("total_ms", "total_low_ms", "total_high_ms", "self_ms", "share"),
)
OPERATORS = ("phase", "module", "layer", "component", "operator", "calls", "traced_ms", "share")
EVENTS = ("phase", "name", "category", "module", "start_us", "duration_us", "depth")
JOINED = (
    *("phase", "module", "layer", "component", "kind_a", "kind_b", "depth"),
    *("total_a_ms", "total_b_ms", "self_a_ms", "self_b_ms", "difference_ms", "ratio", "only_in"),
)
BETWEEN = "(between operators)"
"""What a module spends outside all operators: Python, and the way from one operator to the next."""


@dataclass(frozen=True)
class Place:
    """What is known of a module beside its path."""

    kind: str
    layer: int | None
    component: str


Places = Mapping[str, Place]
NOWHERE = Place("", None, "other")


def module_table(phase: str, steps: Sequence[Sequence[Span]], places: Places) -> pd.DataFrame:
    """The ``modules`` rows of one phase, from the nested module spans of each of its steps."""
    totals: dict[str, list[float]] = defaultdict(list)
    selves: dict[str, list[float]] = defaultdict(list)
    depths: dict[str, int] = {}
    calls: dict[str, int] = {}
    for step in steps:
        total: dict[str, float] = defaultdict(float)
        own: dict[str, float] = defaultdict(float)
        count: dict[str, int] = defaultdict(int)
        for span in step:
            total[span.name] += span.total_ns / 1e6
            own[span.name] += span.self_ns / 1e6
            count[span.name] += 1
            depths.setdefault(span.name, span.depth)
        for path, value in total.items():
            totals[path].append(value)
            selves[path].append(own[path])
        calls |= count
    whole = float(np.median(totals[""])) if steps else 0.0
    rows = []
    for path, values in totals.items():
        place, median = places.get(path, NOWHERE), quantile(values, 0.5)
        assert median is not None, path
        self_ms = float(np.median(selves[path]))
        rows.append(
            (
                *(phase, path, place.layer, place.component, place.kind, depths[path], calls[path]),
                *(median.value, median.low, median.high, self_ms, self_ms / whole),
            )
        )
    return _typed(pd.DataFrame(rows, columns=list(MODULES)), ("total_low_ms", "total_high_ms"))


def operator_table(phase: str, step: Sequence[Span], places: Places) -> pd.DataFrame:
    """The ``operators`` rows of one phase, from the nested spans of one step."""
    own: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for span in step:
        key = (span.module, BETWEEN if span.category == "module" else span.name)
        own[key] += span.self_ns / 1e6
        calls[key] += 1
    whole = sum(own.values())
    rows = []
    for (module, operator), ms in own.items():
        place = places.get(module, NOWHERE)
        key = (module, operator)
        rows.append((phase, module, place.layer, place.component, operator, calls[key], ms, ms / whole))
    frame = _typed(pd.DataFrame(rows, columns=list(OPERATORS)))
    return frame.sort_values("traced_ms", ascending=False, ignore_index=True)


def event_table(phase: str, step: Sequence[Span]) -> pd.DataFrame:
    """The ``events`` rows of one phase, from the nested spans of one step."""
    first = min((span.start_ns for span in step), default=0)
    rows = [
        (
            *(phase, span.name, span.category, span.module),
            *((span.start_ns - first) / 1e3, span.total_ns / 1e3, span.depth),
        )
        for span in step
    ]
    return pd.DataFrame(rows, columns=list(EVENTS))


def join_modules(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Two models' ``modules`` side by side, by phase and path, largest change first; see the module for the columns.

    A module that only one of them has (a removed layer, another structure) has NaN on the other side and counts whole.
    Layers that were removed shift the paths of those behind them: a path is a place, not a weight's history.
    """
    both = a.merge(b, on=["phase", "module"], how="outer", suffixes=("_a", "_b"), indicator="side")
    joined = both[["phase", "module"]].copy()
    for name in ("layer", "component", "depth"):
        joined[name] = both[f"{name}_a"].combine_first(both[f"{name}_b"])
    for side in ("a", "b"):
        joined[f"kind_{side}"] = both[f"kind_{side}"].fillna("")
        joined[f"total_{side}_ms"], joined[f"self_{side}_ms"] = (
            both[f"total_ms_{side}"],
            both[f"self_ms_{side}"],
        )
    joined["difference_ms"] = joined["self_b_ms"].fillna(0.0) - joined["self_a_ms"].fillna(0.0)
    joined["ratio"] = joined["total_b_ms"] / joined["total_a_ms"]
    joined["only_in"] = both["side"].map({"left_only": "a", "right_only": "b", "both": ""}).astype(str)
    joined = joined.sort_values("difference_ms", key=abs, ascending=False, ignore_index=True)
    return _typed(joined[list(JOINED)])


def by_component(modules: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds of a step by phase and component: phase, component, self_ms, share; the largest first."""
    sums = modules.groupby(["phase", "component"], as_index=False)[["self_ms", "share"]].sum()
    return sums.sort_values(["phase", "self_ms"], ascending=[True, False], ignore_index=True)


def _typed(frame: pd.DataFrame, numbers: tuple[str, ...] = ()) -> pd.DataFrame:
    return frame.astype({"layer": "Int64", **dict.fromkeys(numbers, "float64")})
