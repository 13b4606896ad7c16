"""The only deletion there is: the files of hidden variants, asked for by name, with a dry run."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Select, delete, select, update

from core.catalog.store import Catalog
from core.catalog.tables import ArtifactRow, FrameRow, RunRow, VariantRow


@dataclass(frozen=True)
class Purge:
    """What a purge deletes, or would delete: artifacts of hidden variants, and their bytes."""

    artifacts: tuple[str, ...]
    bytes: int
    dry_run: bool


def purge(catalog: Catalog, *, dry_run: bool) -> Purge:
    """Delete the files of hidden variants that no visible one and no run shares; their runs and recipes stay.

    The rows go first: a crash afterwards leaves files that nothing lists, never a listed variant without files.
    """
    stored = select(VariantRow.artifact).where(VariantRow.artifact.is_not(None))
    query = select(ArtifactRow.hash, ArtifactRow.bytes).where(
        ArtifactRow.hash.in_(stored),
        ArtifactRow.hash.not_in(stored.where(VariantRow.hidden.is_(False))),
        ArtifactRow.hash.not_in(select(FrameRow.artifact)),
        *(ArtifactRow.hash.not_in(_kept_by_runs(role)) for role in ("artifact", "result")),
    )
    if dry_run:
        with catalog.read() as session:
            doomed = session.execute(query).all()
        return Purge(tuple(row.hash for row in doomed), sum(row.bytes for row in doomed), dry_run)
    with catalog.write() as session:
        doomed = session.execute(query).all()
        hashes = tuple(row.hash for row in doomed)
        session.execute(update(VariantRow).where(VariantRow.artifact.in_(hashes)).values(artifact=None))
        session.execute(delete(ArtifactRow).where(ArtifactRow.hash.in_(hashes)))
    for hash_ in hashes:
        catalog.artifacts.remove(hash_)
    return Purge(hashes, sum(row.bytes for row in doomed), dry_run)


def _kept_by_runs(role: str) -> Select[tuple[str]]:
    """What trainings and exports made and what probes found: artifacts that a run names under ``role`` in its conditions."""
    hash_ = RunRow.conditions[role].as_string()
    return select(hash_).where(RunRow.kind.in_(("probe", "train", "export")), hash_.is_not(None))
