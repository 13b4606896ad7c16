"""The lock that makes a catalog's supervisor the only one: a file lock, which the system frees at any death."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from core.catalog.engine import home, parse_url

TRIES = 20
PAUSE_S = 0.05


def lock_path(url: str) -> Path:
    """The lock file of a catalog; several catalogs may share a folder."""
    folder, name = home(parse_url(url))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.supervisor.lock"


def _take_lock(url: str) -> IO[str] | None:
    """The lock, held while the file is open; None when another process holds it."""
    file = lock_path(url).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def supervisor_pid(url: str) -> int | None:
    """The pid of the catalog's living supervisor, if there is one."""
    file = _take_lock(url)
    if file is not None:
        file.close()
        return None
    text = lock_path(url).read_text(encoding="utf-8")
    return int(text) if text.isdigit() else None


def hold_lock(url: str) -> IO[str] | None:
    """Take the lock for life and write our pid into it; a look by ``supervisor_pid`` may hold it for a moment."""
    for _ in range(TRIES):
        file = _take_lock(url)
        if file is not None:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        time.sleep(PAUSE_S)
    return None
