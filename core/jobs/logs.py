"""A job's log file, read from its end."""

from __future__ import annotations

import os
from pathlib import Path

BYTES_PER_LINE = 400


def tail(path: str | Path, lines: int = 50) -> list[str]:
    """The last lines of a log, or of as much of it as they usually take; none when there is no log yet."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - lines * BYTES_PER_LINE))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-lines:]
