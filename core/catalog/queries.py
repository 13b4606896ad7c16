"""What the pages read: one row per variant, one variant in full. Read-only, and quick at 100 000 runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sqlalchemy import func, select

from core.catalog.records import run_record
from core.catalog.store import Catalog
from core.catalog.tables import FrameRow, Headline, MeasurementRow, RecipeRow, RunRow, VariantRow
from core.errors import BadInput
from core.types import Run, RunKind, Variant

MEASURES = (
    "kl",
    "bits_per_byte",
    "perplexity",
    "top1_agreement",
    "flips",
    "cosine_agreement",
    "spearman",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "ttft_ms",
    "tpot_ms",
    "load_ms",
    "peak_memory_bytes",
)
"""Columns every trade-off frame has, measured or not; further measurements follow in alphabetical order."""

_VARIANT_COLUMNS = {
    "variant": VariantRow.id,
    "name": VariantRow.name,
    "recipe": RecipeRow.canonical,
    "method": RecipeRow.method,
    "format": VariantRow.format,
    "parameters": VariantRow.parameters,
    "bytes": VariantRow.bytes,
    "bits_per_weight": VariantRow.bits_per_weight,
    "proven": VariantRow.proven,
    "created_at": VariantRow.created_at,
}


@dataclass(frozen=True)
class VariantDetail:
    """Everything about one variant: its ancestors (nearest first), its runs (but those that look inside), its layers,
    its kept frames."""

    variant: Variant
    lineage: tuple[Variant, ...]
    runs: tuple[Run, ...]
    layer_errors: pd.DataFrame
    frames: tuple[tuple[str, str], ...]
    """(run id, frame name) of every frame that ``Catalog.frame`` gives."""


def tradeoff_frame(catalog: Catalog, base_id: str) -> pd.DataFrame:
    """One row per visible variant of a base (the base first), with its headline numbers and their intervals.

    Columns: variant, name, recipe (canonical JSON; missing for the base), method (``base`` for it), format, parameters, bytes,
    bits_per_weight, proven, created_at, flagged (a number shown is of a flagged run), then for every measurement
    ``<name>``, ``<name>_low``, ``<name>_high``, NaN where not measured.
    """
    of_base = (VariantRow.base_id == base_id, VariantRow.hidden.is_(False))
    variants = (
        select(*_VARIANT_COLUMNS.values())
        .outerjoin(RecipeRow, VariantRow.recipe_hash == RecipeRow.hash)
        .where(*of_base)
        .order_by((VariantRow.id != base_id), VariantRow.created_at, VariantRow.id)
    )
    numbers = (
        select(Headline.variant_id, Headline.name, Headline.value, Headline.low, Headline.high)
        .join(VariantRow, VariantRow.id == Headline.variant_id)
        .where(*of_base)
    )
    flagged = select(Headline.variant_id).where(Headline.status == "flagged").distinct()
    with catalog.read() as session:
        frame = pd.DataFrame(map(tuple, session.execute(variants)), columns=list(_VARIANT_COLUMNS))
        frame["flagged"] = frame["variant"].isin(session.scalars(flagged).all())
        # The driver's own tuples: a quarter of a million Row objects would cost as much again as the query.
        cursor = session.connection().execute(numbers).cursor
        assert cursor is not None
        rows = cursor.fetchall()
    frame["method"] = frame["method"].fillna("base")
    return pd.concat([frame, _wide(rows, list(frame["variant"]))], axis=1)


def _wide(rows: Sequence[Sequence[Any]], variants: list[str]) -> pd.DataFrame:
    """Rows (variant, name, value, low, high) as three columns per name, one row per variant, in that order."""
    names = [*MEASURES, *sorted({row[1] for row in rows} - set(MEASURES))]
    line = {id_: i for i, id_ in enumerate(variants)}
    column = {name: 3 * i for i, name in enumerate(names)}
    lines = np.array([line[row[0]] for row in rows], dtype=np.intp)
    columns = np.array([column[row[1]] for row in rows], dtype=np.intp)
    numbers = np.full((3 * len(names), len(variants)), np.nan)
    for part in range(3):
        numbers[columns + part, lines] = np.array([row[2 + part] for row in rows], dtype=np.float64)
    labels = [f"{name}{part}" for name in names for part in ("", "_low", "_high")]
    return pd.DataFrame(numbers.T, columns=labels)


def bases(catalog: Catalog) -> pd.DataFrame:
    """The visible bases, newest work first: id, name, source, family, variants (how many, itself left out)."""
    made = (
        select(
            VariantRow.base_id,
            func.count().label("variants"),
            func.max(VariantRow.created_at).label("latest"),
        )
        .where(VariantRow.hidden.is_(False))
        .group_by(VariantRow.base_id)
        .subquery()
    )
    query = (
        select(
            VariantRow.id,
            VariantRow.name,
            VariantRow.source,
            VariantRow.family,
            (made.c.variants - 1).label("variants"),
        )
        .join(made, made.c.base_id == VariantRow.id)
        .where(VariantRow.id == VariantRow.base_id, VariantRow.hidden.is_(False))
        .order_by(made.c.latest.desc(), VariantRow.id)
    )
    with catalog.read() as session:
        return pd.DataFrame(
            session.execute(query).all(), columns=["id", "name", "source", "family", "variants"]
        )


def newest(catalog: Catalog, *, limit: int) -> pd.DataFrame:
    """The latest visible models, bases included, newest first.

    Columns: id, base_id, name, source, bytes, bits_per_weight, proven, created_at.
    """
    columns = {
        name: getattr(VariantRow, name)
        for name in ("id", "base_id", "name", "source", "bytes", "bits_per_weight", "proven", "created_at")
    }
    query = (
        select(*columns.values())
        .where(VariantRow.hidden.is_(False))
        .order_by(VariantRow.created_at.desc(), VariantRow.id)
        .limit(limit)
    )
    with catalog.read() as session:
        return pd.DataFrame(session.execute(query).all(), columns=list(columns))


def relatives(catalog: Catalog, base_id: str) -> dict[str, str]:
    """Source → name of a base and every visible variant of it, oldest first; names alone, for there may be thousands."""
    query = (
        select(VariantRow.source, VariantRow.name)
        .where(VariantRow.base_id == base_id, VariantRow.hidden.is_(False))
        .order_by(VariantRow.created_at, VariantRow.id)
    )
    with catalog.read() as session:
        return {row.source: row.name for row in session.execute(query)}


def lineage(catalog: Catalog, variant_id: str) -> tuple[Variant, ...]:
    """A variant's ancestors, nearest first, each once."""
    found: dict[str, Variant] = {}
    waiting = list(catalog.variant(variant_id).parents)
    while waiting:
        id_ = waiting.pop(0)
        if id_ not in found:
            found[id_] = catalog.variant(id_)
            waiting.extend(found[id_].parents)
    return tuple(found.values())


def variant_detail(catalog: Catalog, variant_id: str) -> VariantDetail:
    """What the detail drawer shows; raises ``BadInput`` for an unknown variant."""
    frames = (
        select(FrameRow.run_id, FrameRow.name)
        .join(RunRow, RunRow.id == FrameRow.run_id)
        .where(RunRow.variant_id == variant_id)
        .order_by(RunRow.ended_at.desc(), FrameRow.name)
    )
    variant = catalog.variant(variant_id)
    with catalog.read() as session:
        kept = tuple((row.run_id, row.name) for row in session.execute(frames))
    return VariantDetail(
        variant,
        lineage(catalog, variant_id),
        tuple(run for run in catalog.runs(variant_id) if run.kind not in ("probe", "train", "export")),
        catalog.layer_errors(variant_id),
        kept,
    )


def run_of(catalog: Catalog, run_id: str) -> Run:
    """One run with its measurements; raises ``BadInput`` when there is none of that id."""
    with catalog.read() as session:
        row = session.get(RunRow, run_id)
        if row is None:
            raise BadInput(f"no run is called {run_id!r} in this catalog")
        measured = select(MeasurementRow).where(MeasurementRow.run_id == run_id).order_by(MeasurementRow.id)
        return run_record(row, session.scalars(measured))


def runs_of_base(
    catalog: Catalog, base_id: str, kinds: Sequence[RunKind], *, limit: int = 2_000
) -> dict[str, list[Run]]:
    """Variant → the newest runs of these kinds of a base's visible variants with their measurements, newest first."""
    query = (
        select(RunRow)
        .join(VariantRow, VariantRow.id == RunRow.variant_id)
        .where(RunRow.kind.in_(kinds), VariantRow.base_id == base_id, VariantRow.hidden.is_(False))
        .order_by(RunRow.ended_at.desc(), RunRow.id)
        .limit(limit)
    )
    with catalog.read() as session:
        rows = session.scalars(query).all()
        measured: dict[str, list[MeasurementRow]] = {row.id: [] for row in rows}
        ids = list(measured)
        for start in range(0, len(ids), 500):  # SQLite takes some thousand values in one statement
            of_these = MeasurementRow.run_id.in_(ids[start : start + 500])
            for one in session.scalars(select(MeasurementRow).where(of_these).order_by(MeasurementRow.id)):
                measured[one.run_id].append(one)
        found: dict[str, list[Run]] = {}
        for row in rows:
            found.setdefault(row.variant_id, []).append(run_record(row, measured[row.id]))
        return found


def exports(catalog: Catalog, variant_id: str) -> list[Run]:
    """A variant's exports, newest first; those with ``package`` in their conditions can be downloaded."""
    return [run for run in catalog.runs(variant_id) if run.kind == "export"]


def trained(catalog: Catalog, base_id: str) -> list[Run]:
    """The trainings on a base and on its variants, newest first; ``conditions`` has artifact, method and facts."""
    query = (
        select(RunRow)
        .join(VariantRow, VariantRow.id == RunRow.variant_id)
        .where(RunRow.kind == "train", VariantRow.base_id == base_id)
        .order_by(RunRow.ended_at.desc(), RunRow.id)
    )
    with catalog.read() as session:
        return [run_record(row, ()) for row in session.scalars(query)]
