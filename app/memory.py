"""Keep the dashboard's process small: give memory back that a drawn page no longer needs.

A page's frames, Arrow buffers and JSON live for a moment, in whichever thread drew it. glibc keeps one heap per
thread and holds on to what was freed in each; so few heaps are allowed, Arrow allocates from them, and what is free
goes back to the system now and then. Where there is no glibc, nothing is done.
"""

from __future__ import annotations

import ctypes
import threading
import time

M_ARENA_MAX = -8
"""``mallopt(3)``."""
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
    while True:
        time.sleep(EVERY_S)
        libc.malloc_trim(0)
