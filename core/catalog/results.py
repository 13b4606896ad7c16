"""A whole ``Result`` as files: frames as Parquet, pictures as PNG, and everything else as one JSON document.

What goes in comes out equal, so a page draws a stored result as it drew the fresh one. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from core.catalog.queries import run_of
from core.catalog.store import Catalog
from core.errors import BadInput
from core.types import Metric, Provenance, Result, View

DOCUMENT = "result.json"


def put_result(catalog: Catalog, result: Result) -> str:
    """Keep a result in the catalog's artifacts; returns its hash, which a run's conditions carry as ``result``."""
    folder = catalog.artifacts.incoming()
    try:
        write_result(result, folder)
        return catalog.put_artifact(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def result_of(catalog: Catalog, run_id: str) -> Result:
    """The result that a run kept; raises ``BadInput`` for a run that is unknown or kept none."""
    run = run_of(catalog, run_id)
    hash_ = run.conditions.get("result")
    if hash_ is None:
        raise BadInput(f"run {run_id} is of kind {run.kind}, which keeps no whole result")
    return read_result(catalog.artifact_folder(hash_))


def write_result(result: Result, folder: Path) -> None:
    """Write the files; frames and pictures are numbered, because their names need be no file names."""
    for i, frame in enumerate(result.frames.values()):
        frame.to_parquet(folder / f"frame-{i}.parquet", compression="zstd")
    for i, picture in enumerate(result.images.values()):
        (folder / f"image-{i}.png").write_bytes(picture)
    document = {
        "frames": list(result.frames),
        "images": list(result.images),
        "views": [asdict(view) for view in result.views],
        "metrics": [asdict(metric) for metric in result.metrics],
        "provenance": asdict(result.provenance),
        "notes": result.notes,
        "flags": result.flags,
    }
    (folder / DOCUMENT).write_text(json.dumps(document, default=_plain), encoding="utf-8")


def read_result(folder: Path) -> Result:
    """The result that ``write_result`` wrote."""
    document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
    return Result(
        frames={
            name: pd.read_parquet(folder / f"frame-{i}.parquet") for i, name in enumerate(document["frames"])
        },
        views=tuple(View(**{**view, "tooltip": tuple(view["tooltip"])}) for view in document["views"]),
        metrics=tuple(Metric(**metric) for metric in document["metrics"]),
        provenance=Provenance(**document["provenance"]),
        notes=tuple(document["notes"]),
        flags=tuple(document["flags"]),
        images={name: (folder / f"image-{i}.png").read_bytes() for i, name in enumerate(document["images"])},
    )


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's; anything else has no business in a result."""
    return value.item()
