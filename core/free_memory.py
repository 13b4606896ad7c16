"""How much memory this process may still take: the machine's free memory, or less where a container is held to a limit.

Reads the kernel's own figures; knows no torch.
"""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_memory(*, cgroup: Path = CGROUP) -> int:
    """Bytes that can be had without swapping or being killed, as the kernel estimates it."""
    free = int(psutil.virtual_memory().available)
    left = _left_of_limit(cgroup)
    return free if left is None else min(free, left)


def _left_of_limit(cgroup: Path) -> int | None:
    """What a version 2 control group leaves; None where there is no limit. File pages that can be dropped count free."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
