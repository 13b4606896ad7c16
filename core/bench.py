"""Probes and trainings as finished runs of the catalog: what the jobs and the command line share.

Like ``core.loop``, but for looking inside: nothing is compressed or compared. A run keeps its whole result, and a
training its artifact, so both can be opened again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.calling import refuse_misfit, run_probe
from core.entries import entry_of, opened
from core.recording import record
from core.registry import Method, Settings, get
from core.types import ModelRef, Progress, Prompt, Run, part_of, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog


def probe_model(
    catalog: Catalog,
    model: str,
    method_id: str,
    prompt: Prompt,
    *,
    settings: Mapping[str, Any] | None = None,
    reference: str | None = None,
    progress: Progress = silent,
    job_id: str | None = None,
) -> Run:
    """Run a probe and keep its result; the run's conditions hold all that is needed to ask again.

    ``reference`` is the original that a comparing probe holds the model against (default: a variant's base). Raises
    ``BadInput`` where the probe does not fit the model, the prompt or its settings.
    """
    method = get("probe", method_id)
    parsed = method.parse(dict(settings or {}))
    if method.takes_reference and reference is None:
        reference = original_of(catalog, model)
    original = (
        None if reference is None else opened(catalog, reference, progress=part_of(progress, 0.0, 0.05))
    )
    loaded = opened(catalog, model, progress=part_of(progress, 0.05, 0.1))
    entry = entry_of(catalog, loaded)
    started = datetime.now(UTC)
    running = part_of(progress, 0.1, 0.98)
    result = run_probe(method, loaded, prompt, running, parsed, reference=original)
    asked = {**_asked(method, model, parsed), "prompt": asdict(prompt), "reference": reference}
    return record(catalog, "probe", entry.id, result, started, job_id=job_id, also=asked)


def train_on(
    catalog: Catalog,
    model: str,
    method_id: str,
    *,
    text: str = "pydoc",
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    job_id: str | None = None,
) -> Run:
    """Train an instrument on a model's activations over ``text`` and keep it as an artifact.

    The run's conditions hold ``artifact`` (the hash a probe's setting takes), ``method`` and ``facts``. Raises
    ``BadInput`` where the method does not fit the model or its settings.
    """
    from core.text.documents import load_documents

    method = get("train", method_id)
    parsed = method.parse(dict(settings or {}))
    documents = load_documents(text, split="calibration")
    loaded = opened(catalog, model, progress=part_of(progress, 0.0, 0.05))
    refuse_misfit(method, loaded)
    entry = entry_of(catalog, loaded)
    started = datetime.now(UTC)
    trained = method.run(loaded, documents, part_of(progress, 0.05, 0.98), parsed)
    artifact = _kept(catalog, trained.save)
    asked = {
        **_asked(method, model, parsed),
        "text": text,
        "artifact": artifact,
        "facts": dict(trained.facts),
    }
    return record(catalog, "train", entry.id, trained.result, started, job_id=job_id, also=asked)


def original_of(catalog: Catalog, model: str) -> str | None:
    """The source of what a variant was made from; None for a model that is no variant."""
    ref = ModelRef.parse(model)
    if ref.kind != "variant":
        return None
    variant = catalog.variant(ref.source.removeprefix("variant:"))
    return catalog.variant(variant.base_id).source


def _asked(method: Method, model: str, settings: Settings) -> dict[str, Any]:
    return {
        "method": method.id,
        "model": ModelRef.parse(model).located,
        "settings": settings.model_dump(mode="json"),
    }


def _kept(catalog: Catalog, save: Callable[[Path], None]) -> str:
    """The artifact of what ``save(folder)`` writes."""
    incoming = catalog.artifacts.incoming()
    try:
        folder: Path = incoming / "files"
        folder.mkdir()
        save(folder)
        return catalog.put_artifact(folder)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
