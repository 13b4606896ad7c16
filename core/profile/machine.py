"""The roofs of this machine: how fast it reads memory, multiplies matrices, and calls a layer that does nothing.

Every other speed is a share of these. They are measured in a fresh process and kept per environment hash, so they are
taken once per machine and software. ``Roofs.frame`` has one row per roof:

- quantity: ``read_bandwidth`` and ``copy_bandwidth`` (bytes/s; a copy counts what it reads and what it writes),
  ``matrix_rate`` (FLOP/s, a multiply-add is two), ``layer_overhead`` and ``step_overhead`` (s)
- dtype: of a matrix rate, else empty; size: elements of the buffer, n of an n × n × n product, or layers; threads
- value: the best of n repetitions, since a roof is what the machine can do (STREAM's rule: neighbours only slow it);
  median: the middle one; n; unit; kernel: what ran

``machine_roofs(device, progress, again=False)`` measures them or gives what is kept; ``known_roofs(device)`` only reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from core.cpu import physical_cores
from core.durable import whole_file
from core.paths import cache_dir
from core.profile.contention import ContentionMeter
from core.profile.device_lock import exclusive
from core.profile.environment import environment
from core.profile.fresh import ask
from core.types import Progress, content_hash, silent

COLUMNS = ("quantity", "dtype", "size", "threads", "value", "median", "n", "unit", "kernel")
VERSION = 1
"""Raised when a roof is measured otherwise, so that old ones are not taken."""
BUSY_SHARE = 0.10
"""Share of the processors that other programs may take before the roofs are flagged and taken again next time."""


@dataclass(frozen=True)
class Roofs:
    """What this machine can do at best, as measured."""

    device: str
    environment: str
    """Hash of the environment they were taken in."""
    taken_at: str
    """ISO 8601, UTC."""
    other_cpu: float
    """Share of the processors that other programs took meanwhile, 0 to 1."""
    flags: tuple[str, ...]
    frame: pd.DataFrame
    """One row per roof; see the module."""

    def read_bytes_per_s(self, threads: int | None = None) -> float:
        """The highest read bandwidth, of so many threads or of any number (also where so many were not tried)."""
        return self._best("read_bandwidth", threads=threads)

    def flops_per_s(self, dtype: str) -> float:
        """The highest matrix rate of a dtype; of float32 where that dtype was not measured."""
        known = set(self.frame.loc[self.frame["quantity"] == "matrix_rate", "dtype"])
        return self._best("matrix_rate", dtype=dtype if dtype in known else "float32")

    @property
    def layer_overhead_s(self) -> float:
        """Seconds that one layer of an eager torch decoder takes to compute next to nothing: Python and its calls."""
        return self._best("layer_overhead")

    @property
    def step_overhead_s(self) -> float:
        """Seconds of an eager decode step beside its layers, with next to nothing to compute."""
        return self._best("step_overhead")

    def _best(self, quantity: str, *, threads: int | None = None, dtype: str = "") -> float:
        rows = self.frame[(self.frame["quantity"] == quantity) & (self.frame["dtype"] == dtype)]
        same = rows[rows["threads"] == threads]
        return float((same if len(same) else rows)["value"].max())


def machine_roofs(device: str = "cpu", progress: Progress = silent, *, again: bool = False) -> Roofs:
    """The roofs of this machine, measured now unless they are kept and were taken on a quiet machine.

    Raises ``CannotMeasure`` where there is no such device, ``WorkerDied``, and what ``progress`` raises.
    """
    kept = None if again else known_roofs(device)
    if kept is not None and not kept.flags:
        return kept
    with exclusive(device, progress):
        meter = ContentionMeter()
        said = ask(
            "core.profile._roofs",
            {"device": device},
            progress,
            threads=physical_cores(),
            message="measuring the roofs of this machine in a fresh process",
        )
    said["other_cpu"] = meter.share()
    said["flags"] = ["contention"] if said["other_cpu"] > BUSY_SHARE else []
    with whole_file(_file(device)) as part:
        part.write_text(json.dumps(said))
    return _roofs(said)


def known_roofs(device: str = "cpu") -> Roofs | None:
    """The roofs kept for this machine and software; None if none are. Needs no torch on the CPU."""
    file = _file(device)
    return _roofs(json.loads(file.read_text())) if file.is_file() else None


def _file(device: str) -> Path:
    folder = cache_dir() / "roofs"
    folder.mkdir(exist_ok=True)
    return folder / f"{content_hash([VERSION, device, environment(device)['hash']])[:32]}.json"


def _roofs(said: dict[str, Any]) -> Roofs:
    frame = pd.DataFrame(said["rows"], columns=list(COLUMNS))
    return Roofs(
        device=said["device"],
        environment=said["environment"],
        taken_at=said["taken_at"],
        other_cpu=said["other_cpu"],
        flags=tuple(said["flags"]),
        frame=frame.astype({"value": float, "median": float}),
    )
