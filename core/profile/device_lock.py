"""One measurement at a time per device, whoever asks: page, job or command line.

The queue hands out one token per device, but a command line knows nothing of the queue. So whoever measures
also holds a lock file, which the operating system frees when its holder dies, however it dies.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO

from core.paths import data_dir
from core.types import Progress

LOOK_AGAIN_S = 2.0
"""Rarely, because looking takes processor time from the measurement that is waited for."""


@contextmanager
def exclusive(device: str, progress: Progress) -> Iterator[None]:
    """Hold a device for measuring; waits, and says so, while another process does.

    Any device includes the CPU: a GPU is fed by it, and a second measurement there would slow both.
    """
    with ExitStack() as stack:
        for name in sorted({"cpu", device}):
            stack.enter_context(_lock(name, progress))
        yield


@contextmanager
def locked(path: Path, progress: Progress, *, waiting: str) -> Iterator[None]:
    """Hold a lock file; says ``waiting`` while another process does."""
    with path.open("a") as file:
        while not _taken(file):
            progress(0, 1, f"waiting: {waiting}")
            time.sleep(LOOK_AGAIN_S)
        yield  # closing the file frees the lock


def _lock(name: str, progress: Progress) -> AbstractContextManager[None]:
    folder = data_dir() / "locks"
    folder.mkdir(exist_ok=True)
    path = folder / f"device-{name.replace(':', '-')}.lock"
    return locked(path, progress, waiting=f"another profile is running on {name}")


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
