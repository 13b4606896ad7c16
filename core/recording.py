"""A method's result as an immutable run of the catalog: its numbers, what they depend on, and its frames.

A probe's and a training's result is kept whole (``core.catalog.results``), so that a page can draw it again. Knows records and the machine it runs on; nothing of models or of how a number came about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.catalog.records import new_id
from core.catalog.results import put_result
from core.profile.environment import environment
from core.types import Measurement, Metric, Result, Run, RunKind

if TYPE_CHECKING:
    from core.catalog.store import Catalog

KEPT_WHOLE: frozenset[RunKind] = frozenset({"probe", "train"})


def record(
    catalog: Catalog,
    kind: RunKind,
    variant_id: str,
    result: Result,
    started: datetime,
    *,
    job_id: str | None = None,
    layer_stats: pd.DataFrame | None = None,
    also: Mapping[str, Any] | None = None,
    taken_on: Mapping[str, Any] | None = None,
) -> Run:
    """Write one finished run: its measurements, the environment behind them, its frames, and ``also`` as conditions.

    ``taken_on`` is the environment of another machine, where it was not this one.
    """
    source = result.provenance
    facts = dict(taken_on) if taken_on is not None else environment(source.device or "cpu")
    conditions = {
        "method": source.method,
        "settings": dict(source.settings),
        "inputs": dict(source.inputs),
        "dtype": source.dtype,
        "device": source.device,
        **source.conditions,
        "notes": list(result.notes),
        **(also or {}),
    }
    whole = kind in KEPT_WHOLE
    if whole:
        conditions["result"] = put_result(catalog, result)
    run = Run(
        id=new_id(),
        kind=kind,
        variant_id=variant_id,
        status="flagged" if result.flags else "valid",
        flags=result.flags,
        protocol=source.protocol,
        conditions=conditions,
        environment=facts["hash"],
        started_at=started,
        ended_at=datetime.now(UTC),
        job_id=job_id,
        measurements=tuple(_measurement(m) for m in result.metrics if not whole or math.isfinite(m.value)),
    )
    frames = None if whole else result.frames
    return catalog.record_run(run, environment=facts, layer_stats=layer_stats, frames=frames)


def _measurement(metric: Metric) -> Measurement:
    return Measurement(
        metric.name,
        metric.value,
        metric.unit,
        metric.better,
        metric.n,
        metric.low,
        metric.high,
        metric.interval,
    )
