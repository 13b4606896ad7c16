"""How many threads: fewest that read a prompt, and fewest that decode, as fast as any number of them does.

The two differ. Reading is bound by arithmetic and takes every core; decoding is bound by memory, which a few cores use up,
and more only wait for each other (a Raspberry Pi 5 reads best with 4 threads and decodes best with 2; a phone with slow cores
loses 40 % by taking all). Each number of threads is measured in a process of its own; these are ordinary runs, kept and
found again. What is chosen is a setting, not a verdict: for that the two are raced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.cpu import physical_cores
from core.errors import CannotMeasure
from core.profile.grid import cells, measure_cells
from core.types import Progress, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

CLOSE = 0.03
"""Within this share of the fastest, fewer threads are taken: they leave cores to others and cost less energy."""


@dataclass(frozen=True)
class Tuned:
    """The thread counts to use, and what was measured for each."""

    prefill_threads: int
    decode_threads: int | None
    """None for a model that only reads."""
    tried: pd.DataFrame
    """As ``measure_cells`` has it, a row per number of threads."""

    @property
    def threads(self) -> tuple[int, ...]:
        """The counts worth measuring further, without repeats."""
        found = (self.prefill_threads, self.decode_threads)
        return tuple(dict.fromkeys(count for count in found if count is not None))


def candidates() -> tuple[int, ...]:
    """Powers of two up to the physical cores, those themselves, and the logical ones this process may use."""
    physical = physical_cores()
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or physical
    powers = [2**i for i in range(physical.bit_length()) if 2**i <= physical]
    return tuple(sorted({*powers, physical, logical}))


def autotune(
    catalog: Catalog,
    variant: str,
    runtime: str = "torch_eager",
    *,
    settings: Mapping[str, Any] | None = None,
    counts: Sequence[int] | None = None,
    progress: Progress = silent,
) -> Tuned:
    """Measure each number of threads (``counts``, default ``candidates()``) at tier rapid and choose.

    Raises ``CannotMeasure`` where the runtime cannot run here, and what profiling raises.
    """
    others = {name: [value] for name, value in (settings or {}).items() if name not in ("threads", "tier")}
    others["tier"] = ["rapid"]
    counts = counts or candidates()
    chosen = cells(catalog, [variant], [runtime], threads=counts, others=others)
    if chosen[0].refused:
        raise CannotMeasure(chosen[0].refused)
    tried = measure_cells(catalog, chosen, progress=progress).assign(threads=list(counts))
    reading = "ttft_ms" if "ttft_ms" in tried else "latency_ms"
    decode = fewest_close(tried, "tpot_ms") if "tpot_ms" in tried else None
    return Tuned(fewest_close(tried, reading), decode, tried)


def fewest_close(tried: pd.DataFrame, time: str) -> int:
    """The fewest threads whose median time is within ``CLOSE`` of the shortest; rows that failed have none."""
    known = tried.dropna(subset=[time])
    close = known[known[time] <= known[time].min() * (1 + CLOSE)]
    return int(close["threads"].min())
