"""Finished parts of a long piece of work, so that a killed process loses only the part it was in.

One JSON line per part in an append-only file; a line that a crash cut short is not counted. Keys are content
hashes of everything a part depends on, so a part is taken up again only where nothing changed.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


class Journal:
    """The parts that are finished, by key; kept in ``file``, or only in memory without one."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._parts: dict[str, dict[str, Any]] = {}
        self._begin = ""
        if file is not None and file.exists():
            text = file.read_text(encoding="utf-8")
            self._begin = (
                "\n" if text and not text.endswith("\n") else ""
            )  # after a line that a crash cut short
            for line in text.splitlines():
                with suppress(ValueError):
                    part = json.loads(line)
                    self._parts[part["key"]] = part["value"]

    def __len__(self) -> int:
        return len(self._parts)

    def get(self, key: str) -> dict[str, Any] | None:
        """The part of that key, or None where it has yet to be done."""
        return self._parts.get(key)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep a finished part, durably."""
        self._parts[key] = value
        if self._file is None:
            return
        with self._file.open("a", encoding="utf-8") as file:
            file.write(self._begin + json.dumps({"key": key, "value": value}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._begin = ""
