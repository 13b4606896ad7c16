"""Rows to the frozen records of ``core.types`` and back; no record holds on to a database session."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pandas as pd

from core.catalog.tables import Headline, LayerStat, MeasurementRow, RecipeRow, RunRow, VariantRow
from core.errors import BadInput
from core.types import Measurement, Run, Variant

LAYER_COLUMNS = (
    "module",
    "layer",
    "component",
    "bits",
    "parameters",
    "relative_error",
    "sqnr_db",
    "touched",
)


def new_id() -> str:
    """A fresh random id of 12 hex digits, for runs and jobs."""
    return uuid4().hex[:12]


def now() -> datetime:
    """The time, with its zone."""
    return datetime.now(UTC)


def recipe_row(hash_: str, canonical: str) -> RecipeRow:
    """A recipe's row; its method is its steps' methods, joined by `` + ``."""
    steps = json.loads(canonical).get("steps", [])
    return RecipeRow(hash=hash_, canonical=canonical, method=" + ".join(step["method"] for step in steps))


def variant_row(variant: Variant, recipe_hash: str | None) -> VariantRow:
    """A new variant's row, visible."""
    return VariantRow(
        id=variant.id,
        name=variant.name,
        source=variant.source,
        base_id=variant.base_id,
        recipe_hash=recipe_hash,
        artifact=variant.artifact,
        format=variant.format,
        fingerprint=variant.fingerprint,
        architecture=variant.architecture,
        family=variant.family,
        parameters=variant.parameters,
        bytes=variant.bytes,
        bits_per_weight=variant.bits_per_weight,
        proven=variant.proven,
        hidden=False,
        created_at=variant.created_at or now(),
    )


def variant_record(row: VariantRow, recipe: str | None, parents: Sequence[str]) -> Variant:
    """A variant's record, its parents in order."""
    return Variant(
        id=row.id,
        name=row.name,
        source=row.source,
        base_id=row.base_id,
        recipe=recipe,
        artifact=row.artifact,
        format=row.format,
        fingerprint=row.fingerprint,
        architecture=row.architecture,
        family=row.family,
        parameters=row.parameters,
        bytes=row.bytes,
        bits_per_weight=row.bits_per_weight,
        proven=row.proven,
        parents=tuple(parents),
        created_at=row.created_at,
    )


def run_row(run: Run) -> RunRow:
    """A run's row, without its measurements."""
    return RunRow(
        id=run.id,
        kind=run.kind,
        variant_id=run.variant_id,
        status=run.status,
        flags=list(run.flags),
        protocol=run.protocol,
        conditions=dict(run.conditions),
        environment=run.environment or None,
        started_at=run.started_at,
        ended_at=run.ended_at,
        job_id=run.job_id,
    )


def measurement_rows(run: Run) -> list[MeasurementRow]:
    """A run's measurements; raises ``BadInput`` for a number that is none."""
    for measurement in run.measurements:
        if not math.isfinite(measurement.value):
            raise BadInput(
                f"run {run.id}: {measurement.name} is {measurement.value}, which is no measurement; leave it out and "
                "flag the run instead"
            )
    return [
        MeasurementRow(
            run_id=run.id,
            name=m.name,
            value=m.value,
            unit=m.unit,
            better=m.better,
            n=m.n,
            low=m.low,
            high=m.high,
            interval=m.interval,
            conditions=dict(m.conditions),
        )
        for m in run.measurements
    ]


def run_record(row: RunRow, measurements: Iterable[MeasurementRow]) -> Run:
    """A run's record with its measurements."""
    return Run(
        id=row.id,
        kind=row.kind,
        variant_id=row.variant_id,
        status=row.status,
        flags=tuple(row.flags),
        protocol=row.protocol,
        conditions=row.conditions,
        environment=row.environment or "",
        started_at=row.started_at,
        ended_at=row.ended_at,
        job_id=row.job_id,
        measurements=tuple(
            Measurement(m.name, m.value, m.unit, m.better, m.n, m.low, m.high, m.interval, m.conditions)
            for m in measurements
        ),
    )


def headline_row(run: Run, measurement: Measurement) -> Headline:
    """The headline this measurement of this run would be."""
    return Headline(
        variant_id=run.variant_id,
        name=measurement.name,
        value=measurement.value,
        low=measurement.low,
        high=measurement.high,
        unit=measurement.unit,
        better=measurement.better,
        status=run.status,
        ended_at=run.ended_at,
        run_id=run.id,
    )


def layer_rows(run_id: str, frame: pd.DataFrame) -> list[LayerStat]:
    """Rows of a compress method's frame; raises ``BadInput`` when a column is missing."""
    missing = set(LAYER_COLUMNS) - set(frame.columns)
    if missing:
        raise BadInput(f"layer statistics lack {sorted(missing)}; they need {', '.join(LAYER_COLUMNS)}")
    records: list[Mapping[str, Any]] = [
        {column: _plain(value) for column, value in zip(LAYER_COLUMNS, values, strict=True)}
        for values in frame[list(LAYER_COLUMNS)].itertuples(index=False, name=None)
    ]
    return [LayerStat(run_id=run_id, position=i, **record) for i, record in enumerate(records)]


def _plain(value: Any) -> Any:
    """A pandas cell as plain Python; a missing one as None."""
    if pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value
