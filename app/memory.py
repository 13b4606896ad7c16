"""Keep the dashboard's process small: give memory back that a drawn page no longer needs.

A page's frames, Arrow buffers and JSON live for a moment, in whichever thread drew it. glibc keeps one heap per
thread and holds on to what was freed in each; so few heaps are allowed, Arrow allocates from them, and what is free
goes back to the system now and then. Importing a library also touches much code that never runs again; those
pages are let go too and come back from the system's file cache when they are needed. Where there is no glibc,
nothing is done.
"""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path

M_ARENA_MAX = -8
"""``mallopt(3)``."""
MADV_DONTNEED = 4
"""``madvise(2)``."""
MAPS = Path("/proc/self/maps")
HEAPS = 2
EVERY_S = 5.0


def keep_small() -> None:
    """Call once, before threads are started."""
    import pyarrow

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        return
    libc.mallopt(M_ARENA_MAX, HEAPS)
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    threading.Thread(target=_trim, args=(libc,), name="memory", daemon=True).start()


def _trim(libc: ctypes.CDLL) -> None:
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    while True:
        time.sleep(EVERY_S)
        libc.malloc_trim(0)
        for start, size in code_mappings():
            libc.madvise(start, size, MADV_DONTNEED)


def code_mappings() -> list[tuple[int, int]]:
    """Address and size of every mapped file's code: never written to, so its pages can always be read again."""
    found = []
    for line in MAPS.read_text().splitlines() if MAPS.exists() else ():
        addresses, access, _, _, _, *file = line.split(maxsplit=5)
        if access == "r-xp" and file and file[0].startswith("/"):
            start, stop = (int(address, 16) for address in addresses.split("-"))
            found.append((start, stop - start))
    return found
