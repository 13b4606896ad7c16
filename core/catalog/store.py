"""The catalog: records go in and come out, each write in one transaction that also counts the revision.

Records are the frozen ones of ``core.types``; database rows never leave this package. Nothing is overwritten or
deleted here (``purge.py`` does, when asked). Knows no model and no method: a recipe is its canonical JSON.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from core import paths
from core.catalog.artifacts import ArtifactStore
from core.catalog.database import Database
from core.catalog.records import (
    LAYER_COLUMNS,
    headline_row,
    layer_rows,
    measurement_rows,
    new_id,
    now,
    recipe_row,
    run_record,
    run_row,
    variant_record,
    variant_row,
)
from core.catalog.tables import (
    ArtifactRow,
    EnvironmentRow,
    FrameRow,
    Headline,
    LayerStat,
    MeasurementRow,
    RecipeRow,
    RunRow,
    VariantEdge,
    VariantRow,
)
from core.errors import BadInput, CatalogError
from core.types import Family, Run, Variant, content_hash

HEADLINE_KINDS = frozenset({"evaluate", "profile"})
"""Runs whose numbers compare variants, unless their conditions say ``headline`` false; what compressing and proving cost is
read run by run."""
_RENEWED = ("source", "artifact", "format", "fingerprint", "bytes", "bits_per_weight", "proven")
"""What a variant that is made again may get anew; its id, base and recipe are what it is."""
__all__ = ["Catalog", "base_id", "new_id"]


def base_id(fingerprint: str) -> str:
    """The id of the base whose files have this fingerprint: 12 hex digits."""
    return content_hash(["base", fingerprint])[:12]


class Catalog(Database):
    """One catalog, opened: created or brought up to date by a writer; a reader cannot change it."""

    def __init__(self, url: str | None = None, *, read_only: bool = False) -> None:
        """Open ``url`` (default: ``core.paths.catalog_url()``); raises ``CatalogError``."""
        super().__init__(url or paths.catalog_url(), read_only=read_only)
        self.artifacts = ArtifactStore(self.folder / "artifacts")

    # --- variants -------------------------------------------------------------------------------------

    def add_base(
        self,
        source: str,
        *,
        name: str,
        fingerprint: str,
        architecture: str,
        family: Family,
        parameters: int,
        nbytes: int,
        bits_per_weight: float,
        format: str,
    ) -> Variant:
        """Enter a model as it came; its id is its fingerprint's, so the same model is entered once."""
        id_ = base_id(fingerprint)
        return self.add_variant(
            Variant(
                id=id_,
                name=name,
                source=source,
                base_id=id_,
                recipe=None,
                artifact=None,
                format=format,
                fingerprint=fingerprint,
                architecture=architecture,
                family=family,
                parameters=parameters,
                bytes=nbytes,
                bits_per_weight=bits_per_weight,
                proven=True,
            )
        )

    def add_variant(self, variant: Variant) -> Variant:
        """Enter a variant; one that is there already becomes visible again, and is renewed if it was not proven."""
        recipe_hash = None
        with self.write() as session:
            if variant.recipe is not None:
                recipe_hash = content_hash(json.loads(variant.recipe))
                if session.get(RecipeRow, recipe_hash) is None:
                    session.add(recipe_row(recipe_hash, variant.recipe))
                    session.flush()
            known = session.get(VariantRow, variant.id)
            if known is None:
                session.add(variant_row(variant, recipe_hash))
                session.flush()
                for position, parent in enumerate(variant.parents):
                    role: Literal["source", "teacher"] = "source" if position == 0 else "teacher"
                    session.add(
                        VariantEdge(child_id=variant.id, parent_id=parent, position=position, role=role)
                    )
            else:
                known.hidden = False
                if not known.proven or known.artifact is None:
                    for name in _RENEWED:
                        setattr(known, name, getattr(variant, name))
        return self.variant(variant.id)

    def variant(self, id_: str) -> Variant:
        """One variant; raises ``BadInput`` listing close ids."""
        with self.read() as session:
            found = self._variants(session, VariantRow.id == id_)
            if found:
                return found[0]
            known = session.scalars(select(VariantRow.id)).all()
        close = [known_id for known_id in known if id_ and known_id.startswith(id_)]
        close += [match for match in difflib.get_close_matches(id_, known, n=3) if match not in close]
        hint = f"close ones are {', '.join(close[:5])}" if close else "slimscope compare lists them"
        raise BadInput(f"no variant is called {id_!r}; {hint}")

    def variants(self, base_id: str | None = None, *, hidden: bool = False) -> list[Variant]:
        """Variants, oldest first: of one base (itself included) or all; hidden ones only when asked for."""
        conditions: list[ColumnElement[bool]] = [] if hidden else [VariantRow.hidden.is_(False)]
        if base_id is not None:
            conditions.append(VariantRow.base_id == base_id)
        with self.read() as session:
            return self._variants(session, *conditions)

    def _variants(self, session: Session, *conditions: ColumnElement[bool]) -> list[Variant]:
        query = (
            select(VariantRow, RecipeRow.canonical)
            .outerjoin(RecipeRow, VariantRow.recipe_hash == RecipeRow.hash)
            .where(*conditions)
            .order_by(VariantRow.created_at, VariantRow.id)
        )
        edges = (
            select(VariantEdge.child_id, VariantEdge.parent_id)
            .join(VariantRow, VariantRow.id == VariantEdge.child_id)
            .where(*conditions)
            .order_by(VariantEdge.position)
        )
        parents: dict[str, list[str]] = {}
        for child, parent in session.execute(edges):
            parents.setdefault(child, []).append(parent)
        return [
            variant_record(row, recipe, parents.get(row.id, ())) for row, recipe in session.execute(query)
        ]

    def hide_variant(self, id_: str) -> None:
        """Take a variant out of every list; its runs and files stay until ``purge``."""
        self.variant(id_)
        with self.write() as session:
            session.execute(update(VariantRow).where(VariantRow.id == id_).values(hidden=True))

    # --- runs -----------------------------------------------------------------------------------------

    def record_run(
        self,
        run: Run,
        *,
        environment: Mapping[str, Any] | None = None,
        layer_stats: pd.DataFrame | None = None,
        frames: Mapping[str, pd.DataFrame] | None = None,
    ) -> Run:
        """Enter a finished run with its measurements and frames, and move the headlines of its variant on.

        ``environment`` are the facts behind ``run.environment``; ``layer_stats`` is a compress method's frame
        (columns ``LAYER_COLUMNS``). Raises ``BadInput`` for a number that is not finite.
        """
        rows = measurement_rows(run)
        layers = [] if layer_stats is None else layer_rows(run.id, layer_stats)
        kept = [self._frame_row(run.id, name, frame) for name, frame in (frames or {}).items()]
        with self.write() as session:
            if run.environment and session.get(EnvironmentRow, run.environment) is None:
                session.add(EnvironmentRow(hash=run.environment, facts=dict(environment or {})))
                session.flush()
            session.add(run_row(run))
            session.flush()
            session.add_all([*rows, *layers, *kept])
            if run.kind in HEADLINE_KINDS and run.conditions.get("headline", True):
                self._move_headlines(session, run)
        return run

    def _move_headlines(self, session: Session, run: Run) -> None:
        """The latest valid run's number, else the latest flagged one's."""
        seen: set[str] = set()
        for measurement in run.measurements:
            if measurement.name in seen:  # later ones of a name are further points, e.g. other prompt lengths
                continue
            seen.add(measurement.name)
            new = headline_row(run, measurement)
            old = session.get(Headline, (run.variant_id, measurement.name))
            if old is None or (new.status == "valid", new.ended_at) >= (old.status == "valid", old.ended_at):
                session.merge(new)

    def runs(self, variant_id: str) -> list[Run]:
        """Every run of a variant with its measurements, newest first."""
        with self.read() as session:
            rows = session.scalars(
                select(RunRow)
                .where(RunRow.variant_id == variant_id)
                .order_by(RunRow.ended_at.desc(), RunRow.id)
            ).all()
            measured: dict[str, list[MeasurementRow]] = {row.id: [] for row in rows}
            query = (
                select(MeasurementRow)
                .join(RunRow, RunRow.id == MeasurementRow.run_id)
                .where(RunRow.variant_id == variant_id)
                .order_by(MeasurementRow.id)
            )
            for measurement in session.scalars(query):
                measured[measurement.run_id].append(measurement)
            return [run_record(row, measured[row.id]) for row in rows]

    def layer_errors(self, variant_id: str) -> pd.DataFrame:
        """What the latest compress run that kept layer statistics did to each weight (``LAYER_COLUMNS``)."""
        latest = (
            select(RunRow.id)
            .where(RunRow.variant_id == variant_id)
            .where(select(LayerStat.run_id).where(LayerStat.run_id == RunRow.id).exists())
            .order_by(RunRow.ended_at.desc())
            .limit(1)
        )
        query = (
            select(*(getattr(LayerStat, column) for column in LAYER_COLUMNS))
            .where(LayerStat.run_id == latest.scalar_subquery())
            .order_by(LayerStat.position)
        )
        with self.read() as session:
            return pd.DataFrame(session.execute(query).all(), columns=list(LAYER_COLUMNS))

    # --- files ----------------------------------------------------------------------------------------

    def put_artifact(self, folder: Path) -> str:
        """Take a folder's files over (it is gone afterwards) and return their hash; the row comes last."""
        contents = self.artifacts.admit(folder)
        with self.write() as session:
            if session.get(ArtifactRow, contents.hash) is None:
                session.add(
                    ArtifactRow(
                        hash=contents.hash, bytes=contents.bytes, files=contents.files, created_at=now()
                    )
                )
        return contents.hash

    def artifact_folder(self, hash_: str) -> Path:
        """The folder of an artifact that is in the catalog; raises ``CatalogError`` otherwise."""
        with self.read() as session:
            if session.get(ArtifactRow, hash_) is None:
                raise CatalogError(f"artifact {hash_[:12]} is not in the catalog; make the variant again")
        return self.artifacts.folder(hash_)

    def variant_folder(self, variant_id: str) -> Path:
        """The folder of a variant's files; raises ``BadInput`` for one that has none."""
        variant = self.variant(variant_id)
        if variant.artifact is None:
            raise BadInput(
                f"{variant_id} has no files in the catalog; open it by its source, {variant.source}"
            )
        return self.artifact_folder(variant.artifact)

    def put_frame(self, run_id: str, name: str, frame: pd.DataFrame) -> str:
        """Keep a run's frame as Parquet; returns its artifact's hash."""
        row = self._frame_row(run_id, name, frame)
        hash_ = row.artifact
        with self.write() as session:
            session.add(row)
        return hash_

    def _frame_row(self, run_id: str, name: str, frame: pd.DataFrame) -> FrameRow:
        """The row of a frame whose file is in the catalog already."""
        folder = self.artifacts.incoming()
        try:
            frame.to_parquet(folder / "frame.parquet", compression="zstd")
            hash_ = self.put_artifact(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return FrameRow(run_id=run_id, name=name, artifact=hash_, rows=len(frame))

    def frame(self, run_id: str, name: str) -> pd.DataFrame:
        """A run's frame; raises ``BadInput`` listing the run's frames when it has no such one."""
        with self.read() as session:
            rows = session.execute(select(FrameRow.name, FrameRow.artifact).where(FrameRow.run_id == run_id))
            frames = {row.name: row.artifact for row in rows}
        if name not in frames:
            raise BadInput(f"run {run_id} kept no frame {name!r}; it has: {', '.join(frames) or 'none'}")
        return pd.read_parquet(self.artifact_folder(frames[name]) / "frame.parquet")
