"""Resident memory of this process: now, and at its highest.

The peak is the kernel's own high-water mark, so nothing samples memory while a measurement runs and no peak
between two samples is missed. It counts the whole process: Python, torch, weights (memory-mapped pages of the
weight file included, once touched), caches and buffers.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil

_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): reset the high-water mark to what is resident now


def resident_bytes() -> int:
    """Bytes resident now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Most bytes ever resident since the start, or since ``reset_peak`` succeeded."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Let the high-water mark start again from what is resident now; False where the system refuses."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True
