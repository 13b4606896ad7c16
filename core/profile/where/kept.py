"""A look at a catalog's variant as a finished run, and what it says about the bottleneck of each phase.

The run is of kind ``probe`` and keeps its whole result, so that a page draws it again. Two models are looked at one
after the other and joined by module path (``tables.join_modules``).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from core.entries import folder_of
from core.profile.bottleneck import Verdict, verdict
from core.profile.machine import Roofs
from core.profile.roofline import profile_of, steps_of
from core.profile.shapes import known_shape, shapes_of
from core.profile.where.look import where_the_time_goes
from core.profile.work import Phase, Step, work_under
from core.recording import record
from core.registry import get
from core.types import Progress, Result, Run, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog
    from core.profile.runtimes._base import ProfileSettings


def look_at(
    catalog: Catalog,
    variant_id: str,
    *,
    runtime: str = "torch_eager",
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    job_id: str | None = None,
) -> Run:
    """Look where a variant's time goes and keep the result (``catalog.results.result_of``); settings are the runtime's.

    Raises what ``where_the_time_goes`` raises, and ``CannotOpen`` where the variant's files are gone or changed.
    """
    variant = catalog.variant(variant_id)
    parsed = cast("ProfileSettings", get("profile", runtime).parse(dict(settings or {})))
    folder = folder_of(catalog, variant, progress=progress)
    started = datetime.now(UTC)
    result = where_the_time_goes(folder, runtime, progress, parsed)
    return record(catalog, "probe", variant.id, result, started, job_id=job_id)


def verdicts_of(
    catalog: Catalog, variant_id: str, look: Result, roofs: Roofs, progress: Progress = silent
) -> list[tuple[Verdict, str]]:
    """The bottleneck of every phase that was looked at, and where its time is from.

    Times are those of the newest profile with the same runtime and settings; where there is none, the look's own steps
    without clocks, of which there are few. Empty where the model's shape cannot be counted.
    """
    seen, variant = look.provenance.conditions, catalog.variant(variant_id)
    shape = known_shape(variant.fingerprint)
    if shape is None:
        folder = folder_of(catalog, variant, progress=progress)
        shape = shapes_of({variant.fingerprint: folder}, progress).get(variant.fingerprint)
    if shape is None:
        return []
    runtime = str(seen["runtime"])
    run = profile_of(catalog, variant_id, roofs.device, runtime, look.provenance.settings)
    if run is not None:
        source = f"profile {run.id}" + (f", flagged {' '.join(run.flags)}" if run.flags else "")
        return [(verdict(step, roofs), source) for _, step in steps_of(run, shape)]
    source = "the look's own steps; no profile with these settings yet"
    source += f", flagged {' '.join(look.flags)}" if look.flags else ""
    seen = {**seen, "dtype": look.provenance.dtype}
    found = []
    for name, milliseconds in seen["step_ms"].items():
        phase = cast("Phase", name)
        work = work_under(seen, phase, shape, seen["weights_memory_bytes"])
        step = Step(phase, milliseconds / 1e3, work, look.provenance.dtype, runtime, len(shape.layers))
        found.append((verdict(step, roofs), source))
    return found
