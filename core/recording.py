"""A method's result as an immutable run of the catalog: its numbers, what they depend on, and its frames.

Knows records and the machine it runs on; nothing of models or of how a number came about.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pandas as pd

from core.catalog.records import new_id
from core.profile.environment import environment
from core.types import Measurement, Metric, Result, Run, RunKind

if TYPE_CHECKING:
    from core.catalog.store import Catalog


def record(
    catalog: Catalog,
    kind: RunKind,
    variant_id: str,
    result: Result,
    started: datetime,
    *,
    job_id: str | None = None,
    layer_stats: pd.DataFrame | None = None,
) -> Run:
    """Write one finished run: its measurements, the environment behind them, and its frames."""
    source = result.provenance
    facts = environment(source.device or "cpu")
    conditions = {
        "method": source.method,
        "settings": dict(source.settings),
        "inputs": dict(source.inputs),
        "dtype": source.dtype,
        "device": source.device,
        **source.conditions,
        "notes": list(result.notes),
    }
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
        measurements=tuple(_measurement(metric) for metric in result.metrics),
    )
    return catalog.record_run(run, environment=facts, layer_stats=layer_stats, frames=result.frames)


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
