"""Which jobs a grid of measurements and a race mean: each alone on its host, all of one click in one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from core.errors import BadInput
from core.jobs.plan import RECENT
from core.jobs.queue import Queue, device_token
from core.jobs.states import ACTIVE
from core.profile.grid import Cell
from core.profile.paired_blocks import DELTA
from core.profile.runtimes._base import PLAIN
from core.registry import get
from core.types import Job


def submit_profiles(queue: Queue, chosen: Sequence[Cell], *, again: bool = False) -> list[Job]:
    """Queue a profile for each cell that is not measured yet (``again``: for each that can be).

    What is still waiting or running is returned as it is. Raises ``BadInput`` where nothing is left to do.
    """
    to_do = [cell for cell in chosen if not cell.refused and (again or cell.measured_run is None)]
    if not to_do:
        refused = next((cell.refused for cell in chosen if cell.refused), "")
        raise BadInput(f"nothing to measure: {refused or 'every cell was measured here before'}")
    jobs: list[Job] = []
    for cell in to_do:
        spec = {
            "model": f"variant:{cell.variant}",
            "recipe": None,
            "method": cell.runtime,
            "settings": dict(cell.settings),
            "headline": cell.headline,
        }
        jobs.append(_once(queue, "profile", spec, jobs[0].group_id if jobs else None))
    return jobs


def submit_race(
    queue: Queue,
    a: str,
    b: str,
    *,
    phase: Literal["prefill", "decode"] = "decode",
    runtime_a: str = PLAIN,
    runtime_b: str = PLAIN,
    settings_a: Mapping[str, Any] | None = None,
    settings_b: Mapping[str, Any] | None = None,
    blocks: int | None = None,
    delta: float = DELTA,
) -> Job:
    """Queue one race of two variants (ids); the same one still waiting or running is returned as it is.

    Raises ``BadInput`` for a variant, runtime or settings that cannot be.
    """
    for id_ in (a, b):
        queue.catalog.variant(id_)
    for runtime, settings in ((runtime_a, settings_a), (runtime_b, settings_b)):
        get("profile", runtime).parse(dict(settings or {}))
    spec = {
        "model": f"variant:{b}",
        "a": a,
        "b": b,
        "phase": phase,
        "runtime_a": runtime_a,
        "runtime_b": runtime_b,
        "settings_a": dict(settings_a or {}),
        "settings_b": dict(settings_b or {}),
        "blocks": blocks,
        "delta": delta,
    }
    return _once(queue, "race", spec, None)


def _once(queue: Queue, kind: str, spec: dict[str, Any], group_id: str | None) -> Job:
    for job in queue.jobs(RECENT):
        if job.state in ACTIVE and job.kind == kind and job.spec == spec:
            return job
    return queue.submit(kind, spec, token=device_token(), group_id=group_id)
