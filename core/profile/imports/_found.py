"""What a reader finds in a report, and how it makes numbers of samples: the same quantiles as our own, or none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from core.errors import BadInput
from core.profile.quantiles import quantile
from core.types import Better, Metric


@dataclass(frozen=True)
class Found:
    """One measurement of a report: a workload on a device."""

    metrics: tuple[Metric, ...]
    conditions: Mapping[str, Any]
    """What the report says of the workload; ``device_model`` where it names the device."""
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def of_samples(name: str, samples: Sequence[Any], unit: str, better: Better) -> Metric:
    """The median with its 95 % interval, as far as n allows. Raises ``BadInput`` for no samples or none that are numbers."""
    found = quantile([number(sample, name) for sample in samples], 0.5)
    if found is None:
        raise BadInput(f"the report has no samples of {name}; export it again with its samples")
    bounded = found.low is not None or found.high is not None
    how = f"95 % order-statistics interval of the median, {found.n} samples of the report"
    text = how if bounded else f"none: {found.n} samples are too few"
    return Metric(name, found.value, unit, better, found.n, found.low, found.high, text)


def stated(name: str, value: Any, unit: str, better: Better) -> Metric:
    """A number that the report states without the samples behind it."""
    text = "none: the report has no samples of it"
    return Metric(name, number(value, name), unit, better, interval=text)


def number(value: Any, name: str) -> float:
    """A finite number that is not negative; raises ``BadInput``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value < math.inf):
        raise BadInput(
            f"the report's {name} is {value!r}, which is no measured number; export the report again"
        )
    return float(value)
