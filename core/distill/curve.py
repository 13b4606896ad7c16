"""The course of a training, point by point: a file that can be read while it grows, and the frames made of it.

One JSON line per point. ``update`` points have the loss that was minimised, its parts, gradient norm, learning rate
and pace; ``held_out`` points what was measured on rows that are never learned from, and what the model wrote there.
Knows no model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pandas as pd

NAME = "curve.jsonl"
DRAWN = 1000
"""Points of a line; of more, neighbours are averaged."""
PART = "part_"
"""How the columns of the loss's parts begin."""
Kind = Literal["update", "held_out"]


class Curve:
    """The points so far; kept in ``file``, or only in memory without one."""

    def __init__(self, file: Path | None, *, keep: int = 0) -> None:
        """Go on behind the first ``keep`` points of the file; what a stopped process wrote after them is done again."""
        self._file = file
        self.points: list[dict[str, Any]] = []
        if file is None:
            return
        self.points = read_points(file)[:keep] if keep else []
        file.write_text("".join(_line(point) for point in self.points), encoding="utf-8")

    def add(self, kind: Kind, **values: Any) -> None:
        """Append a point, so that others can read it at once."""
        point = {"kind": kind, **values}
        self.points.append(point)
        if self._file is not None:
            with (
                suppress(OSError),
                self._file.open("a", encoding="utf-8") as stream,
            ):  # a full disk stops no training
                stream.write(_line(point))

    def flush(self) -> None:
        """Make what was written survive a power cut."""
        if self._file is not None:
            with suppress(OSError), self._file.open("rb") as stream:  # as above
                os.fsync(stream.fileno())


def read_points(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a curve's file; none where there is no file yet."""
    if not file.exists():
        return []
    points = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            points.append(json.loads(line))
    return points


def curve_frame(points: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per update (or per few): tokens, loss, its parts, gradient norm, learning rate, pace."""
    rows = [
        {
            "update": point["update"],
            "tokens": point["tokens"],
            "loss": point["loss"],
            **{f"{PART}{name}": value for name, value in point["parts"].items()},
            "gradient_norm": point["gradient_norm"],
            "learning_rate": point["learning_rate"],
            "tokens_per_s": point["tokens_per_s"],
        }
        for point in points
        if point["kind"] == "update"
    ]
    columns = ["update", "tokens", "loss", "gradient_norm", "learning_rate", "tokens_per_s"]
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns, dtype="float64")
    every = -(-len(frame) // DRAWN)
    if every <= 1:
        return frame
    thinned = frame.groupby(frame.index // every).mean()
    ends = frame.groupby(frame.index // every)[["update", "tokens"]].last()
    return thinned.assign(update=ends["update"], tokens=ends["tokens"])


def held_out_frame(points: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per measurement and measure: tokens, measure, value, and whether these weights were the best so far."""
    rows = [
        {"tokens": point["tokens"], "measure": name, "value": value, "best": point["best"]}
        for point in points
        if point["kind"] == "held_out"
        for name, value in point["values"].items()
    ]
    return pd.DataFrame(rows, columns=["tokens", "measure", "value", "best"])


def samples_frame(points: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What the model wrote at each measurement: tokens, prompt, continuation."""
    rows = [
        {"tokens": point["tokens"], "prompt": prompt, "continuation": text}
        for point in points
        if point["kind"] == "held_out"
        for prompt, text in point["samples"]
    ]
    return pd.DataFrame(rows, columns=["tokens", "prompt", "continuation"])


def _line(point: Mapping[str, Any]) -> str:
    return json.dumps(point) + "\n"
