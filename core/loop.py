"""The loop on a catalog: register a base, make a proven variant, evaluate it, profile it, compare.

The command line calls these functions directly and the job worker calls them from the queue, so both mean the
same by a variant and by a number. Every number is taken from files reloaded from disk, and is entered as one finished,
immutable run: killed at any moment, a function leaves whole runs or none, and no variant counts as proven before its
proof is in the catalog.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.entries import (
    base_folder_of,
    base_of,
    enter_base,
    entry_of,
    folder_of,
    learned_by,
    opened,
    reopened,
    second_models,
)
from core.errors import BadInput
from core.journal import Journal
from core.material import material_of
from core.models.task import task_of
from core.recipe import Recipe
from core.recording import record
from core.registry import Method, get
from core.scratch import variant_scratch
from core.types import Family, ModelRef, Progress, Run, Variant, part_of, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

EVALUATION_OF: dict[Family, str] = {
    "decoder": "language_modelling",
    "encoder": "embedding_agreement",
    "vision": "image_classification",
    "classifier": "text_classification",
}
"""The evaluation of each model family when none is named."""

COMPARE_COLUMNS = (
    "variant",
    "recipe",
    "bytes",
    "bits_per_weight",
    "kl",
    "kl_low",
    "kl_high",
    "bits_per_byte",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "peak_memory_bytes",
    "proven",
    "on_front",
)
"""First columns of ``compare``; further measurements follow."""


@dataclass(frozen=True)
class Made:
    """A variant that was made, or found already made, with its latest reload proof."""

    variant: Variant
    proof: Run
    reused: bool

    def summary(self) -> dict[str, Any]:
        """What the command line prints: id, bytes, recipe and proof."""
        measured = {m.name: m.value for m in self.proof.measurements}
        return {
            "variant": self.variant.id,
            "name": self.variant.name,
            "base": self.variant.base_id,
            "bytes": self.variant.bytes,
            "bits_per_weight": self.variant.bits_per_weight,
            "proven": self.variant.proven,
            "reused": self.reused,
            "proof": {**self.proof.conditions, **measured},
            "recipe": json.loads(self.variant.recipe or "null"),
            "open": f"variant:{self.variant.id}",
        }


def register(catalog: Catalog, model: str, *, progress: Progress = silent) -> Variant:
    """The catalog's entry of a model, found by its id or its files; a new one is opened, verified and entered as a base."""
    from core.catalog.store import base_id
    from core.models.checkpoint import fingerprint
    from core.models.open import local_folder

    ref = ModelRef.parse(model)
    if ref.kind == "variant":
        return catalog.variant(ref.source.removeprefix("variant:"))
    with suppress(BadInput):  # not entered yet
        known = catalog.variant(base_id(fingerprint(local_folder(ref, progress=progress))))
        return catalog.add_variant(known)  # visible again
    return enter_base(catalog, opened(catalog, model, progress=progress))


def make_variant(
    catalog: Catalog,
    model: str,
    recipe: Recipe,
    *,
    progress: Progress = silent,
    job_id: str | None = None,
) -> Made:
    """Compress ``model`` by ``recipe``, save, prove the reload, and enter the variant; a proven one is reused.

    Steps that keep finished work go on from where an earlier call was stopped, whoever made it (``core.scratch``).
    Raises ``CannotCompress`` where the recipe does not apply, ``ProofFailed`` where the files do not reload.
    """
    from core.compress._pipeline import compress
    from core.text.documents import load_documents

    recipe = recipe.located
    loaded = opened(catalog, model, progress=part_of(progress, 0.0, 0.15))
    parent = entry_of(catalog, loaded)
    id_ = recipe.variant_id(loaded.fingerprint)
    known = already_made(catalog, id_)
    if known is not None:
        return known
    text = recipe.calibration
    documents = None if text is None else load_documents(text, split="calibration")
    references = second_models(catalog, model, parent, recipe)
    teachers = [entry_of(catalog, reference) for reference in references.values()]
    task = task_of(loaded)
    started = datetime.now(UTC)
    incoming = catalog.artifacts.incoming()
    try:
        with variant_scratch(catalog.folder / "scratch", id_, job_id=job_id) as scratch:
            made = compress(
                loaded, recipe, documents, incoming / "files", part_of(progress, 0.15, 0.95),
                references=references, scratch=scratch,
            )  # fmt: skip
        artifact = catalog.put_artifact(incoming / "files")
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    variant = Variant(
        id=id_,
        name=recipe.label(),
        source=f"variant:{id_}",
        base_id=base_of(
            id_, parent, task, loaded, zip((t.base_id for t in teachers), references.values(), strict=True)
        ),
        recipe=recipe.canonical(),
        artifact=artifact,
        format=made.saved.format,
        fingerprint=made.saved.fingerprint,
        architecture=loaded.anatomy.architecture,
        family=loaded.family,
        parameters=made.saved.parameters,
        bytes=made.saved.bytes,
        bits_per_weight=made.saved.bytes * 8 / made.saved.parameters,
        proven=made.proof.passed,
        parents=tuple(dict.fromkeys((parent.id, *(teacher.id for teacher in teachers)))),
    )
    proved = datetime.now(UTC) - timedelta(seconds=made.proof.seconds)
    progress(0.97, 1.0, "entering the variant into the catalog")
    catalog.add_variant(replace(variant, proven=False))  # proven only once the proof is in the catalog too
    stats = made.result.frame
    record(catalog, "compress", variant.id, made.result, started, job_id=job_id, layer_stats=stats)
    proof = record(catalog, "proof", variant.id, made.proof.as_result(), proved, job_id=job_id)
    return Made(catalog.add_variant(variant), proof, reused=False)


def evaluate_variant(
    catalog: Catalog,
    variant_id: str,
    *,
    method: str | None = None,
    documents: str = "pydoc",
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    scratch: Path | None = None,
    job_id: str | None = None,
) -> Run:
    """Measure the quality of a variant against its base, both reloaded from disk, on held-out documents or pictures.

    For a vision model ``documents`` names pictures, and the embedded default means the embedded digits; for a text
    classifier labelled rows, by default the held-out ones of what it was trained on. ``settings``
    values may be text. Finished parts are kept in ``scratch``, and the next call goes on from there.
    """
    variant = catalog.variant(variant_id)
    base = catalog.variant(variant.base_id)
    chosen = get("evaluate", method or EVALUATION_OF[variant.family])
    parsed = _settings(chosen, settings)
    learned = learned_by(catalog, variant)
    material = material_of(chosen, documents, parsed, learned=learned)
    started = datetime.now(UTC)
    base_model = reopened(catalog, base, part_of(progress, 0.0, 0.05))
    chosen.refuse_if(base_model.missing_needs(chosen.needs), base.name)
    model = base_model if variant.id == base.id else reopened(catalog, variant, part_of(progress, 0.05, 0.1))
    journal = Journal(None if scratch is None else scratch / "documents.jsonl")
    result = chosen.run(base_model, model, material, journal, part_of(progress, 0.1, 0.98), parsed)
    return record(catalog, "evaluate", variant.id, result, started, job_id=job_id)


def profile_variant(
    catalog: Catalog,
    variant_id: str,
    *,
    method: str = "torch_eager",
    settings: Mapping[str, Any] | None = None,
    headline: bool = True,
    progress: Progress = silent,
    job_id: str | None = None,
) -> Run:
    """Measure speed and memory of a variant's files in a fresh process; ``settings`` values may be text.

    With ``headline`` false the numbers are kept without becoming those that the variant is shown with: a cell of a grid.
    """
    from core.profile.parity import against_base

    variant = catalog.variant(variant_id)
    chosen = get("profile", method)
    parsed = _settings(chosen, settings)
    folder = folder_of(catalog, variant, progress=progress)
    started = datetime.now(UTC)
    with against_base(base_folder_of(catalog, variant)):
        result = chosen.run(folder, progress, parsed)
    also = None if headline else {"headline": False}
    return record(catalog, "profile", variant.id, result, started, job_id=job_id, also=also)


def compare(
    catalog: Catalog, *, base: str | None = None, objective: str = "bytes", quality: str | None = None
) -> pd.DataFrame:
    """One row per variant, bases included, with every headline measurement and whether it is on its base's front.

    ``base`` narrows to one base, by id or by how it was opened. Raises ``BadInput`` for an unknown one.
    """
    from core.catalog.queries import tradeoff_frame
    from core.tradeoff import objective as known_objective
    from core.tradeoff import pareto_front, quality_column, usable

    bases = [variant for variant in catalog.variants() if variant.id == variant.base_id]
    if base is not None:
        chosen = [b for b in bases if base in (b.id, b.source, b.name)]
        if not chosen:
            raise BadInput(
                f"no base {base!r} in the catalog; there are: {', '.join(b.source for b in bases) or 'none'}"
            )
        bases = chosen
    frames = []
    for entry in bases:
        frame = tradeoff_frame(catalog, entry.id)
        x, y = known_objective(objective).column, known_objective(quality or quality_column(frame)).column
        front = pareto_front(frame, x, y, eligible=usable(frame))
        frames.append(frame.assign(base=entry.source, on_front=front.on_front))
    rows = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    return rows.reindex(columns=[*COMPARE_COLUMNS, *(c for c in rows.columns if c not in COMPARE_COLUMNS)])


def already_made(catalog: Catalog, id_: str) -> Made | None:
    """A variant that was already made and proven, made visible again; None if there is none."""
    with suppress(BadInput):
        known = catalog.variant(id_)
        proofs = [run for run in catalog.runs(id_) if run.kind == "proof"]
        if known.proven and known.artifact and proofs:
            return Made(catalog.add_variant(known), proofs[0], reused=True)
    return None


def _settings(method: Method, values: Mapping[str, Any] | None) -> Any:
    """Settings from values that may be text (command line) or data (job spec)."""
    return method.parse_text(
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in (values or {}).items()}
    )
