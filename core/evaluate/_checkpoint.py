"""Finished documents of an evaluation on disk, one JSON line each: what is left after ``kill -9``.

Knows rows and a file; whether a row still fits what is being measured is the evaluation's to say.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from core.evaluate._document_score import Row


class Checkpoint:
    """Rows by document number; each is on disk before the next document begins.

    Used as ``evaluate_documents(…, finished=checkpoint.rows, on_document=checkpoint.add)``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[int, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        data = path.read_bytes()
        # Behind the last line end is what a killed writer left of a line: that document is run again.
        whole = data[: data.rfind(b"\n") + 1]
        os.truncate(path, len(whole))
        for line in whole.splitlines():
            row: Row = json.loads(line)
            self.rows[row["document"]] = row

    def add(self, document: int, row: Row) -> None:
        """Keep a finished document's row."""
        self.rows[document] = row
        with self._path.open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
