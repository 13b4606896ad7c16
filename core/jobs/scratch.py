"""The folders in which jobs keep unfinished work between their attempts."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

from sqlalchemy import select

from core.catalog.records import now
from core.catalog.store import Catalog
from core.catalog.tables import JobRow
from core.jobs.states import ENDED
from core.scratch import sweep_variants

KEPT_DAYS = 7


def scratch_folder(catalog: Catalog, job_id: str) -> Path:
    """A job's folder: on the artifacts' file system, so that a finished artifact is moved by renaming."""
    return catalog.folder / "scratch" / job_id


def sweep(catalog: Catalog) -> list[Path]:
    """Remove what no attempt will take up: scratch of jobs that ended, and of variants left unfinished, a week ago, and
    half-written artifacts. What a paused job left waits for it, however long."""
    long_ago = now() - timedelta(days=KEPT_DAYS)
    query = select(JobRow.id).where(JobRow.state.in_(ENDED), JobRow.ended_at < long_ago)
    with catalog.read() as session:
        ended = session.scalars(query).all()
        unfinished = session.scalars(select(JobRow.id).where(JobRow.state.not_in(ENDED))).all()
    removed = [path for id_ in ended if (path := scratch_folder(catalog, id_)).exists()]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return (
        removed
        + sweep_variants(catalog.folder / "scratch", unfinished=unfinished)
        + catalog.artifacts.sweep()
    )
