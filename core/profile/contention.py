"""How much of our processors other programs take while we measure.

Two OpenMP threads meet at a barrier after every matrix product, so one busy neighbour on one of two cores can
make a forward ten times slower. A number taken then is about the neighbour. The share is read from the kernel's
counters of the processors this process may run on: everything that was busy, less our own CPU time and that of
our children, plus what the hypervisor took away (steal).

It refuses to judge: it reports shares, the protocol says what is too much.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

_IDLE = ("idle", "iowait", "guest", "guest_nice")
"""Not busy; a guest's time is already counted in user time."""
_FREQUENCY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class _Reading:
    wall_s: float
    busy_s: float
    own_s: float


class ContentionMeter:
    """Other programs' share of our processors since the last reading, 0 to 1."""

    def __init__(self) -> None:
        self._processors = _usable_processors()
        self._last = self._read()

    def elapsed_s(self) -> float:
        """Seconds since the last reading."""
        return time.perf_counter() - self._last.wall_s

    def share(self) -> float:
        """Others' share since the last reading, and start anew. Reliable to 0.01 s / (seconds × processors)."""
        before, self._last = self._last, self._read()
        wall = self._last.wall_s - before.wall_s
        others = (self._last.busy_s - before.busy_s) - (self._last.own_s - before.own_s)
        return min(1.0, max(0.0, others / (wall * len(self._processors))))

    def _read(self) -> _Reading:
        times = psutil.cpu_times(percpu=True)
        # Own time first: reading costs CPU that would otherwise count as somebody else's.
        own = own_cpu_seconds()
        busy = sum(
            value
            for processor in self._processors
            for name, value in times[processor]._asdict().items()
            if name not in _IDLE
        )
        return _Reading(time.perf_counter(), busy, own)


def own_cpu_seconds() -> float:
    """CPU seconds of this process, of its living descendants, and of children it has waited for."""
    waited = os.times()
    return time.process_time() + waited.children_user + waited.children_system + _descendants_cpu(os.getpid())


def wait_until_quiet(
    limit: float, *, wait_s: float, notify: Callable[[str], None], look_s: float = 0.5
) -> float:
    """Sleep until others take less than ``limit`` during ``look_s``, at most ``wait_s``; returns the last share."""
    meter, deadline = ContentionMeter(), time.perf_counter() + wait_s
    while True:
        time.sleep(look_s)
        share = meter.share()
        if share <= limit or time.perf_counter() >= deadline:
            return share
        notify(f"waiting for a quiet moment: other programs take {share:.0%} of the processors")


def clock_mhz() -> float | None:
    """Mean clock of the processors this process may use, in MHz; None where the system does not tell."""
    files = [_FREQUENCY / f"cpu{n}" / "cpufreq" / "scaling_cur_freq" for n in _usable_processors()]
    if not files[0].exists():
        return None
    return sum(int(file.read_text()) for file in files) / len(files) / 1000


def _usable_processors() -> list[int]:
    """Numbers of the processors this process may run on; all of them where the system has no affinity."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count() or 1))


def _descendants_cpu(pid: int) -> float:
    """CPU seconds of living children and theirs, from ``/proc``; 0 on systems without it."""
    total = 0.0
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in file.read_text().split()]
        except OSError:
            continue  # the thread ended between the listing and the reading
        for child in children:
            try:
                spent = psutil.Process(child).cpu_times()
            except psutil.NoSuchProcess:
                continue  # ended just now; it counts as waited for at the next reading
            total += spent.user + spent.system + spent.children_user + spent.children_system
            total += _descendants_cpu(child)
    return total
