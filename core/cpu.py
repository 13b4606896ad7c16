"""What the processor is: model, instruction sets and cores, as far as the operating system tells.

Knows nothing of models or measurements. Facts that a virtual machine hides are None, never guessed.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import psutil

_CPUINFO = Path("/proc/cpuinfo")
_X86 = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16")
_X86_TILES = ("amx_tile", "amx_int8", "amx_bf16", "amx_fp16")
_ARM = ("asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2", "sme")


@cache
def cpu_model() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


@cache
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of interest to matrix kernels that this processor has; empty if not told."""
    return tuple(name for name in (*_X86, *_X86_TILES, *_ARM) if name in _flags())


def is_virtual_machine() -> bool:
    """Whether a hypervisor says that it is there (x86 only): neighbours on the same host are then invisible."""
    return "hypervisor" in _flags()


def physical_cores() -> int:
    """Physical cores this process may run on: hyper-threads share one core's arithmetic, so they add none."""
    usable = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else None
    known = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return min(known, usable or known)


def _flags() -> frozenset[str]:
    info = _cpuinfo()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of ``/proc/cpuinfo``; empty on systems without it."""
    if not _CPUINFO.exists():
        return {}
    first = _CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
