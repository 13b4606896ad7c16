"""Answers of the command line as text: progress on a terminal, records as JSON or as tables for a reader.

Knows the shapes of our records and nothing of what they mean.
"""

from __future__ import annotations

import base64
import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import pandas as pd

from core.types import Measurement, Metric, Progress, Result, silent


def terminal_progress() -> Progress:
    """Progress as one rewritten line on a terminal, silent elsewhere."""
    if not sys.stderr.isatty():
        return silent
    last = 0.0

    def show(done: float, total: float, message: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.1 or done >= total:
            last = now
            share = f"{done / total:4.0%}" if total else "    "
            end = "\n" if total and done >= total else ""
            sys.stderr.write(f"\r\x1b[K{share} {message}{end}")
            sys.stderr.flush()

    return show


def plain(value: Any) -> Any:
    """Any of our records as JSON data; a number that is not finite becomes null."""
    if isinstance(value, pd.DataFrame):
        return plain(value.to_dict("records"))
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):  # a picture
        return base64.b64encode(value).decode()
    if hasattr(value, "item"):  # a NumPy scalar
        return plain(value.item())
    return None if value is pd.NaT or value is pd.NA else str(value)


def human(answer: Any) -> str:
    """The same answer for a reader: tables where there are rows, ``name value unit [low, high]`` for metrics."""
    if isinstance(answer, pd.DataFrame):
        return answer.to_string(index=False) if len(answer) else "nothing yet"
    if isinstance(answer, Result):
        lines = [_metric_line(metric) for metric in answer.metrics]
        return "\n".join([*lines, *answer.notes, "", answer.frame.head(40).to_string(index=False)])
    if isinstance(answer, (list, tuple)):
        return (
            human(pd.json_normalize([plain(item) for item in answer], max_level=0))
            if answer
            else "nothing yet"
        )
    if hasattr(answer, "measurements"):
        return "\n".join(_metric_line(measurement) for measurement in answer.measurements)
    flat = plain(answer)
    return "\n".join(f"{key:<24} {json.dumps(value, ensure_ascii=False)}" for key, value in flat.items())


def _metric_line(metric: Metric | Measurement) -> str:
    interval = (
        f" [{metric.low:.4g}, {metric.high:.4g}]"
        if metric.low is not None and metric.high is not None
        else ""
    )
    n = f"  n={metric.n}" if metric.n else ""
    return f"{metric.name:<26} {metric.value:.6g} {metric.unit}{interval}{n}"
