"""The catalog's tables: what is stored, under which keys, and nothing about how it is read or written.

Thirteen tables. ``run``, ``measurement`` and ``layer_stat`` are immutable (triggers, see ``immutable.py``): a
repeat is a new run. ``headline`` repeats one number per variant and measurement name, so that the trade-offs of
25 000 variants are one range scan. ``job`` and ``job_event`` belong to ``core.jobs``.
"""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Enum, ForeignKey, Index, MetaData, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from core.types import Better, Family, JobState, RunKind, RunStatus

EdgeRole = Literal["source", "teacher"]
BigInt = BigInteger()

NAMING = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time in Python; a naive UTC time in the database, because SQLite keeps no zone."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC, then without its zone."""
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The zone back on."""
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Declarative base; constraint names are fixed because Alembic's batch mode finds them by name."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar = {
        dict[str, Any]: JSON(),
        list[str]: JSON(),
        datetime: UtcDateTime(),
        str: Text(),
        Literal: Enum(enum.Enum, native_enum=False, length=16),
    }


class Meta(Base):
    """Counters of the whole catalog: ``revision`` (content) and ``jobs_revision`` (the queue)."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(BigInt)


class ArtifactRow(Base):
    """A content-addressed folder of files that is complete on disk: its row is written last."""

    __tablename__ = "artifact"
    hash: Mapped[str] = mapped_column(primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInt)
    files: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class RecipeRow(Base):
    """A recipe's canonical JSON by its hash; ``method`` is its steps' methods, for filtering."""

    __tablename__ = "recipe"
    hash: Mapped[str] = mapped_column(primary_key=True)
    canonical: Mapped[str]
    method: Mapped[str] = mapped_column(index=True)


class VariantRow(Base):
    """A base or what a recipe made of it."""

    __tablename__ = "variant"
    __table_args__ = (Index(None, "base_id", "created_at"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    source: Mapped[str]
    base_id: Mapped[str] = mapped_column(ForeignKey("variant.id"))
    recipe_hash: Mapped[str | None] = mapped_column(ForeignKey("recipe.hash"))
    artifact: Mapped[str | None] = mapped_column(ForeignKey("artifact.hash"), index=True)
    format: Mapped[str]
    fingerprint: Mapped[str]
    architecture: Mapped[str]
    family: Mapped[Family]
    parameters: Mapped[int] = mapped_column(BigInt)
    bytes: Mapped[int] = mapped_column(BigInt)
    bits_per_weight: Mapped[float]
    proven: Mapped[bool]
    hidden: Mapped[bool]
    created_at: Mapped[datetime]


class VariantEdge(Base):
    """Who a variant was made from; distillation has two parents."""

    __tablename__ = "variant_edge"
    child_id: Mapped[str] = mapped_column(ForeignKey("variant.id"), primary_key=True)
    parent_id: Mapped[str] = mapped_column(ForeignKey("variant.id"), primary_key=True, index=True)
    position: Mapped[int]
    role: Mapped[EdgeRole]


class EnvironmentRow(Base):
    """A software and hardware fingerprint."""

    __tablename__ = "environment"
    hash: Mapped[str] = mapped_column(primary_key=True)
    facts: Mapped[dict[str, Any]]


class RunRow(Base):
    """One finished execution; immutable. ``job_id`` is no foreign key: the CLI also runs without the queue."""

    __tablename__ = "run"
    __table_args__ = (Index(None, "variant_id", "ended_at"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[RunKind]
    variant_id: Mapped[str] = mapped_column(ForeignKey("variant.id"))
    status: Mapped[RunStatus]
    flags: Mapped[list[str]]
    protocol: Mapped[str]
    conditions: Mapped[dict[str, Any]]
    environment: Mapped[str | None] = mapped_column(ForeignKey("environment.hash"))
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime] = mapped_column(index=True)
    job_id: Mapped[str | None]


class MeasurementRow(Base):
    """One number of a run; immutable. The first of a name in a run is the one that may become a headline."""

    __tablename__ = "measurement"
    __table_args__ = (Index(None, "run_id", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"))
    name: Mapped[str]
    value: Mapped[float]
    unit: Mapped[str]
    better: Mapped[Better]
    n: Mapped[int | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    interval: Mapped[str]
    conditions: Mapped[dict[str, Any]]


class FrameRow(Base):
    """A run's frame, kept as Parquet in an artifact."""

    __tablename__ = "frame"
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    artifact: Mapped[str] = mapped_column(ForeignKey("artifact.hash"), index=True)
    rows: Mapped[int]


class LayerStat(Base):
    """What a compress run did to one weight; immutable. ``layer`` is None outside the blocks."""

    __tablename__ = "layer_stat"
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    module: Mapped[str]
    layer: Mapped[int | None]
    component: Mapped[str]
    bits: Mapped[float | None]
    parameters: Mapped[int] = mapped_column(BigInt)
    relative_error: Mapped[float | None]
    sqnr_db: Mapped[float | None]
    touched: Mapped[bool]


class Headline(Base):
    """One number per variant and measurement name: of the latest valid run, else of the latest flagged one."""

    __tablename__ = "headline"
    __table_args__ = ({"sqlite_with_rowid": False},)
    variant_id: Mapped[str] = mapped_column(ForeignKey("variant.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]
    low: Mapped[float | None]
    high: Mapped[float | None]
    unit: Mapped[str]
    better: Mapped[Better]
    status: Mapped[RunStatus]
    ended_at: Mapped[datetime]
    run_id: Mapped[str] = mapped_column(ForeignKey("run.id"))


class JobRow(Base):
    """One entry of the queue. ``pid`` with ``pid_created`` (seconds since the epoch) names one process for ever."""

    __tablename__ = "job"
    __table_args__ = (Index(None, "created_at", "id"), Index(None, "state", "created_at"))
    id: Mapped[str] = mapped_column(primary_key=True)
    group_id: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    spec: Mapped[dict[str, Any]]
    state: Mapped[JobState]
    token: Mapped[str | None]
    attempt: Mapped[int]
    max_attempts: Mapped[int]
    done: Mapped[float]
    total: Mapped[float]
    message: Mapped[str]
    error: Mapped[str]
    log_path: Mapped[str]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    host: Mapped[str | None]
    pid: Mapped[int | None]
    pid_created: Mapped[float | None]
    rss_bytes: Mapped[int | None] = mapped_column(BigInt)
    exit_code: Mapped[int | None]
    cancel_requested: Mapped[bool]
    pause_requested: Mapped[bool]
    depends_on: Mapped[str | None] = mapped_column(ForeignKey("job.id"), index=True)
    blocked: Mapped[bool]
    """Cancelled only because its predecessor did not succeed; a retry of that one queues this again."""
    result: Mapped[dict[str, Any]]


class JobEvent(Base):
    """What happened to a job, in order; only ever appended to."""

    __tablename__ = "job_event"
    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), index=True)
    at: Mapped[datetime]
    attempt: Mapped[int]
    state: Mapped[JobState]
    message: Mapped[str]
