"""Which jobs a look at where the time goes means, and one that measures the roofs of this machine: each alone on its host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.jobs.plan import RECENT
from core.jobs.queue import Queue, device_token
from core.jobs.states import ACTIVE
from core.profile.runtimes._base import PLAIN
from core.registry import get
from core.types import Job


def submit_where(
    queue: Queue, variant: str, *, runtime: str = PLAIN, settings: Mapping[str, Any] | None = None
) -> Job:
    """Queue a look at where a variant's time goes; the same one still waiting or running is returned as it is.

    Raises ``BadInput`` for a variant, runtime or settings that cannot be.
    """
    queue.catalog.variant(variant)
    get("profile", runtime).parse(dict(settings or {}))
    spec = {"model": f"variant:{variant}", "method": runtime, "settings": dict(settings or {})}
    return _once(queue, "where", spec)


def submit_machine(queue: Queue, base: str, *, again: bool = False) -> Job:
    """Queue the roofs of this machine, and what the steps of a base's variants have to read."""
    queue.catalog.variant(base)
    return _once(queue, "machine", {"model": f"variant:{base}", "again": again})


def _once(queue: Queue, kind: str, spec: dict[str, Any]) -> Job:
    for job in queue.jobs(RECENT):
        if job.state in ACTIVE and job.kind == kind and job.spec == spec:
            return job
    return queue.submit(kind, spec, token=device_token())
