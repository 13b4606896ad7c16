"""Numbers that other programs measured, entered as runs of kind ``import`` whose protocol begins with ``imported``: tier D.

They are attached to a variant, or to a hidden entry ``external:NAME`` for a model that the catalog does not have. Being of a
kind of their own they are never a variant's headline, never count as its profile, and never give a verdict. The same file is
entered once per variant, by its content.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

from core.catalog.records import new_id
from core.errors import BadInput
from core.profile.comparability import IMPORTED
from core.profile.imports import ai_hub, llama_bench, onnx_runtime, optimum_benchmark
from core.profile.imports._found import Found
from core.types import Measurement, Run, Variant, content_hash

if TYPE_CHECKING:
    from core.catalog.store import Catalog

READERS: tuple[ModuleType, ...] = (llama_bench, optimum_benchmark, onnx_runtime, ai_hub)
MOST_BYTES = 256 * 2**20
EXTERNAL = "external:"


def import_report(
    catalog: Catalog, path: Path, *, variant: str | None = None, name: str | None = None
) -> list[Run]:
    """Enter a report's numbers; those of a file that is in already are returned as they are.

    ``variant`` is an id of the catalog; without one the entry is called ``name``, or by the file. Raises ``BadInput`` for a
    file that is none of the known reports, is too large, or has numbers that are none, and for an unknown variant.
    """
    content = _content(path)
    reader, data = _recognised(path, content)
    found: list[Found] = reader.read(data)
    target = catalog.variant(variant) if variant else _external(catalog, name or path.stem)
    digest = hashlib.sha256(content).hexdigest()
    known = [
        run
        for run in reversed(catalog.runs(target.id))
        if run.kind == "import" and run.conditions.get("inputs", {}).get("report") == digest
    ]
    entered = {int(run.conditions["row"]) for run in known}
    rest = [
        _record(catalog, target, reader, one, row, digest)
        for row, one in enumerate(found)
        if row not in entered
    ]
    return sorted([*known, *rest], key=lambda run: int(run.conditions["row"]))


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise BadInput(f"{path} is no file; give a report, one of: {_expected()}")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise BadInput(
            f"{path.name} has {size:,} bytes, more than the {MOST_BYTES:,} of a report; cut it down"
        )
    return path.read_bytes()


def _recognised(path: Path, content: bytes) -> tuple[ModuleType, Any]:
    """The reader that knows this file, and the file as data."""
    for data in _readings(content):
        for reader in READERS:
            if reader.matches(data):
                return reader, data
    raise BadInput(f"{path.name} is none of the reports that can be imported; expected one of: {_expected()}")


def _readings(content: bytes) -> list[Any]:
    """The file as JSON, else as lines of JSON, else as YAML; empty if it is none of them."""
    try:
        text = content.decode()
        return [json.loads(text)]
    except UnicodeDecodeError:
        return []
    except (ValueError, RecursionError):
        pass
    try:
        return [[json.loads(line) for line in text.splitlines() if line.strip()]]
    except (ValueError, RecursionError):
        pass
    try:
        return [yaml.safe_load(text)]
    except (yaml.YAMLError, RecursionError):
        return []


def _expected() -> str:
    return "; ".join(str(reader.EXPECTED) for reader in READERS)


def _external(catalog: Catalog, name: str) -> Variant:
    """The hidden entry of a model that only reports know: no files, no parameters, in no list."""
    id_ = content_hash([EXTERNAL, name])[:12]
    variant = catalog.add_variant(
        Variant(
            id=id_,
            name=name,
            source=EXTERNAL + name,
            base_id=id_,
            recipe=None,
            artifact=None,
            format="external",
            fingerprint=content_hash([EXTERNAL, name]),
            architecture="",
            family="decoder",
            parameters=0,
            bytes=0,
            bits_per_weight=0.0,
            proven=False,
        )
    )
    catalog.hide_variant(id_)
    return variant


def _record(
    catalog: Catalog, target: Variant, reader: ModuleType, found: Found, row: int, digest: str
) -> Run:
    """One measurement of the report as a run; its environment is not this machine's, and so is empty."""
    now = datetime.now(UTC)
    run = Run(
        id=new_id(),
        kind="import",
        variant_id=target.id,
        status="valid",
        flags=(),
        protocol=f"{IMPORTED} {reader.TITLE}",
        conditions={**found.conditions, "method": reader.TITLE, "row": row, "inputs": {"report": digest}},
        environment="",
        started_at=now,
        ended_at=now,
        measurements=tuple(
            Measurement(m.name, m.value, m.unit, m.better, m.n, m.low, m.high, m.interval)
            for m in found.metrics
        ),
    )
    return catalog.record_run(run, frames=found.frames)
