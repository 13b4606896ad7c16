"""Exports as finished runs of the catalog: a folder where the user wants it, or a package kept beside the variants.

Like ``core.loop``, but for what leaves: the command line writes a folder, a job keeps one ZIP file as an artifact, which
the dashboard sends from disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.entries import entry_of, opened
from core.errors import CannotExport
from core.output import plain
from core.recording import record
from core.registry import Settings, get
from core.types import Progress, Run, Variant, part_of, silent
from core.whole_folder import whole_folder

if TYPE_CHECKING:
    from core.catalog.store import Catalog

WIDEST = 2.5
"""Bytes on disk while exporting, as a multiple of the model in float32: a traced graph and the one made from it."""


@dataclass(frozen=True)
class Exported:
    """An export that was made."""

    variant: Variant
    run: Run
    folder: Path | None
    """Where the files are; None for a package in the catalog."""

    def summary(self) -> dict[str, Any]:
        """What the command line prints."""
        measured = {m.name: m.value for m in self.run.measurements}
        facts = {k: self.run.conditions[k] for k in ("format", "runtime", "files", "settings", "notes")}
        where = {"folder": str(self.folder)} if self.folder else {"package": package_of(self.run)}
        return {"variant": self.variant.id, "run": self.run.id, **where, **measured, **plain(facts)}


def export_to(
    catalog: Catalog,
    model: str,
    format_: str,
    folder: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write ``model`` in a format to ``folder``, which appears whole or not at all, and enter the run.

    Raises ``CannotExport`` where the format cannot hold the model or its outputs are missed, ``MissingLibrary``.
    """
    return _export(catalog, model, format_, folder, settings, progress, job_id=None, keep=False)


def export_package(
    catalog: Catalog,
    model: str,
    format_: str,
    *,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    job_id: str | None = None,
) -> Exported:
    """The same as one ZIP file among the catalog's artifacts; the run's conditions name ``artifact`` and ``package``."""
    incoming = catalog.artifacts.incoming()
    try:
        return _export(
            catalog, model, format_, incoming / "files", settings, progress, job_id=job_id, keep=True
        )
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def package_of(run: Run) -> str:
    """``HASH/NAME.zip``: where the store has an export's package, and what the dashboard's route takes."""
    return f"{run.conditions['artifact']}/{run.conditions['package']}"


def _export(
    catalog: Catalog,
    model: str,
    format_: str,
    folder: Path,
    settings: Mapping[str, Any] | None,
    progress: Progress,
    *,
    job_id: str | None,
    keep: bool,
) -> Exported:
    from core.export._package import describe

    method = get("export", format_)
    parsed: Settings = method.parse(dict(settings or {}))
    loaded = opened(catalog, model, progress=part_of(progress, 0.0, 0.1))
    method.refuse_if(loaded.missing_needs(method.needs), str(loaded.ref))
    variant = entry_of(catalog, loaded)
    started = datetime.now(UTC)
    wanted = int(WIDEST * 4 * variant.parameters)
    with loaded.lock, whole_folder(folder, wanted, refuse=CannotExport) as incoming:
        result = method.run(loaded, incoming, part_of(progress, 0.1, 0.9), parsed)
        progress(0.9, 1.0, "writing the model card")
        describe(catalog, variant, result, incoming)
    also: dict[str, Any] = {}
    if keep:
        progress(0.95, 1.0, "packing")
        also = _packed(catalog, folder, f"{variant.id}-{format_}")
    run = record(catalog, "export", variant.id, result, started, job_id=job_id, also=also)
    return Exported(variant, run, None if keep else folder)


def _packed(catalog: Catalog, folder: Path, name: str) -> dict[str, str]:
    from core.export._package import pack

    kept = folder.parent / "package"
    kept.mkdir()
    pack(folder, kept / f"{name}.zip")
    return {"artifact": catalog.put_artifact(kept), "package": f"{name}.zip"}
