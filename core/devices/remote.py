"""Measuring a variant on a device that is reached by SSH or adb.

The device gets the agent (one file, Python's standard library only) and the variant's files for one of its engines;
it measures by itself and keeps what it found until it is fetched, so a lost link costs nothing: the same call finds
the same job and goes on. Raw samples come back; their statistics are made here, by the same code as this machine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from core.types import Progress, Result, Run, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog


class Reachable(Protocol):
    """What must be known of a device to reach it; the registry's entries have it."""

    slug: str
    transport: Literal["ssh", "adb"] | None
    """None: only in the registry, to predict for."""
    ssh_alias: str | None
    """A Host of the user's own ssh configuration: user, port, keys and jumps are there, never here."""
    adb_serial: str | None
    python: str | None
    """The device's Python to use, e.g. of an environment with onnxruntime; None looks for one."""
    power_mode: str | None
    """What it is expected to run in; another one that is found is flagged."""


@dataclass(frozen=True)
class Engine:
    """Something on the device that can run a model."""

    id: str
    available: bool
    version: str | None
    install: str
    """The command that adds it there."""


@dataclass(frozen=True)
class Probed:
    """What a device says of itself; no host name, user or path."""

    host: Mapping[str, Any]
    """Its part of the environment hash: processor, cores, memory, governor, power mode …"""
    software: Mapping[str, Any]
    state: Mapping[str, Any]
    """What changes by the minute: free memory and disk in bytes, temperature, load, clocks."""
    engines: tuple[Engine, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class DeviceJob:
    """A measurement that a device has and we have not fetched."""

    id: str
    running: bool
    variant: str
    engine: str
    started_at: str


def probe(device: Reachable, *, progress: Progress = silent) -> Probed:
    """Connect, see what the device is and which engines it has. Raises ``CannotConnect`` with the next move."""
    raise NotImplementedError


def calibrate(device: Reachable, *, progress: Progress = silent) -> Result:
    """The device's roofs, about five seconds: read bandwidth by threads, matrix rate where a library is there, overhead."""
    raise NotImplementedError


def profile_on_device(
    catalog: Catalog,
    variant_id: str,
    device: Reachable,
    *,
    engine: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    job_id: str | None = None,
) -> Run:
    """Measure a variant on a device and enter the run; goes on with a job that an earlier call left there.

    ``engine`` None takes the first available of llama_bench, onnxruntime, openvino, torch. ``settings`` are those of
    every runtime (tier, prompt_tokens, new_tokens, batch, threads, depth, …). Measurements are named
    ``decode_tokens_per_s_<engine>_on_<slug>``.
    """
    raise NotImplementedError


def unfinished(device: Reachable) -> tuple[DeviceJob, ...]:
    """Jobs that lie on the device: running, or finished and not yet fetched."""
    raise NotImplementedError


def clean(device: Reachable) -> int:
    """Remove everything of ours from the device; bytes freed. Refused while a job runs there."""
    raise NotImplementedError
