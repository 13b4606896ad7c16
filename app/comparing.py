"""Two results of one probe on one input: the scales they share, and where they differ; frames in, frames out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from app.arrangement import Limits
from core.types import Result, View

FIRST, SECOND = "first", "second"


@dataclass(frozen=True)
class Difference:
    """Second minus first where both have the same cell, as a result of its own; and what could not be compared."""

    result: Result
    words: tuple[str, ...]


def shared_limits(first: Result, second: Result) -> Limits:
    """The ends of every number that views show, over both results, so that equal colours mean equal numbers."""
    limits: dict[tuple[str, str], tuple[float, float]] = {}
    for view in first.views:
        for column in (view.color, view.y, view.x):
            frames = [result.frames.get(view.frame) for result in (first, second)]
            if column is None or any(f is None or column not in f or not _number(f[column]) for f in frames):
                continue
            both = pd.concat([frame[column] for frame in frames if frame is not None]).dropna()
            both = both[both > 0] if view.log else both
            if len(both):
                limits[view.frame, column] = float(both.min()), float(both.max())
    return limits


def metric_table(first: Result, second: Result) -> pd.DataFrame:
    """Headline numbers of both, and their difference: columns metric, unit, first, second, difference."""
    others = {metric.name: metric for metric in second.metrics}
    rows = [
        {
            "metric": metric.name,
            "unit": metric.unit,
            FIRST: metric.value,
            SECOND: others[metric.name].value,
            "difference": others[metric.name].value - metric.value,
        }
        for metric in first.metrics
        if metric.name in others
    ]
    return pd.DataFrame(rows, columns=["metric", "unit", FIRST, SECOND, "difference"])


def difference(first: Result, second: Result) -> Difference:
    """Every map and token strip that both results have, as second minus first, cell by cell."""
    frames: dict[str, pd.DataFrame] = {}
    views: list[View] = []
    words: list[str] = []
    for name, group in _comparable(first.views).items():
        if name not in second.frames:
            continue
        left, right = first.frames[name], second.frames[name]
        for keys, members in group.items():
            joined, said = _joined(left, right, keys, members)
            words += [] if said is None else [said]
            if joined is None:
                continue
            label = f"{name}_{'_'.join(keys)}"
            frames[label] = joined
            views += [_difference_view(view, label) for view in members if view.color in joined]
    return Difference(Result(frames, tuple(views)), tuple(dict.fromkeys(words)))


def _comparable(views: Sequence[View]) -> dict[str, dict[tuple[str, ...], list[View]]]:
    """Maps, pictures and strips by frame and by the columns that name a cell."""
    found: dict[str, dict[tuple[str, ...], list[View]]] = {}
    for view in views:
        if view.kind not in ("heatmap", "tokens") or view.color is None:
            continue
        keys = (view.x,) if view.kind == "tokens" or view.y is None else (view.y, view.x)
        found.setdefault(view.frame, {}).setdefault(keys, []).append(view)
    return found


def _joined(
    left: pd.DataFrame, right: pd.DataFrame, keys: tuple[str, ...], views: Sequence[View]
) -> tuple[pd.DataFrame | None, str | None]:
    """Rows of both with the same keys, each measured column as difference; or why there are none."""
    columns = [v.color for v in views if v.color in left and v.color in right and _number(left[v.color])]
    if not set(keys) <= set(left) & set(right) or not columns:
        return None, None
    tokens = [c for c in (*(f"{key}_token" for key in keys), "token") if c in left and c in right]
    both = left[[*keys, *dict.fromkeys([*tokens, *columns])]].merge(
        right[[*keys, *dict.fromkeys([*tokens, *columns])]],
        on=list(keys),
        suffixes=("", "_other"),
        validate="1:1",
    )
    for token in tokens:
        if (both[token] != both[f"{token}_other"]).any():
            count = [frame[keys[-1]].nunique() for frame in (left, right)]
            return None, (
                f"The two models split this text into different tokens ({count[0]} and {count[1]}), so position 3 of "
                "one is not position 3 of the other: there is no difference over positions."
            )
    if both.empty:
        return None, f"The two results have no {' and '.join(keys)} in common."
    said = None
    if len(both) < max(len(left), len(right)):
        said = f"Only the {len(both):,} cells that both models have are compared ({len(left):,} and {len(right):,})."
    made = both[[*keys, *tokens]].copy()
    for column in columns:
        one, other = both[column].astype(float), both[f"{column}_other"].astype(float)
        made[column], made[f"{FIRST}_{column}"], made[f"{SECOND}_{column}"] = other - one, one, other
    return made, said


def _difference_view(view: View, frame: str) -> View:
    tooltip = (f"{FIRST}_{view.color}", f"{SECOND}_{view.color}")
    return replace(
        view,
        frame=frame,
        title=f"Difference: {view.title[:1].lower()}{view.title[1:]}",
        text=view.text if view.kind == "tokens" else None,
        midpoint=0.0,
        log=False,
        tooltip=tooltip,
    )


def _number(column: pd.Series) -> bool:
    return is_numeric_dtype(column) and not is_bool_dtype(column)
