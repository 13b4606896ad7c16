"""Which jobs a device of one's own means: looking at it, trusting its key, measuring its roofs or a variant, a file to run there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from core.devices.job import engine_named
from core.devices.registry import device
from core.jobs.plan import RECENT
from core.jobs.queue import Queue
from core.jobs.states import ACTIVE
from core.types import Job

Action = Literal["check", "key", "trust", "calibrate", "profile", "script", "clean"]


def submit_device(
    queue: Queue,
    slug: str,
    action: Action,
    *,
    variant: str | None = None,
    engine: str | None = None,
    settings: Mapping[str, Any] | None = None,
    fingerprint: str = "",
) -> Job:
    """Queue one thing to do with a device; the same one still waiting or running is returned as it is.

    ``profile`` and ``script`` need a ``variant`` (id), ``trust`` the ``fingerprint``. Raises ``BadInput`` for a device, variant
    or engine that is not known. Nothing here needs this machine for itself: it is the device that measures.
    """
    device(slug)
    spec: dict[str, Any] = {"model": f"device:{slug}", "slug": slug, "action": action}
    if variant is not None:
        queue.catalog.variant(variant)
        chosen = None if engine is None else engine_named(engine)
        spec |= {"variant": variant, "engine": chosen, "settings": dict(settings or {})}
    if fingerprint:
        spec["fingerprint"] = fingerprint
    for job in queue.jobs(RECENT):
        if job.state in ACTIVE and job.kind == "device" and job.spec == spec:
            return job
    return queue.submit("device", spec)
