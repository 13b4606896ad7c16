"""Where the making of a variant keeps finished work, so that it goes on where it was stopped: after a cancel, a crash, a
kill, and from the command line as from a job.

One folder per variant id, which names base and recipe; it is gone once the variant is made. Knows no step.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from core.errors import ProofFailed

PREFIX = "variant-"
JOB = "job"
KEPT_S = 7 * 86_400.0
"""Finished work that nobody took up for so long is removed."""


@contextmanager
def variant_scratch(root: Path, variant_id: str, *, job_id: str | None = None) -> Iterator[Path | None]:
    """The folder of a variant's unfinished work, removed when the block ends well; None while another process has it.

    ``job_id`` is the job that makes it: while that one is paused or waits, nothing is swept. What did not reload is not taken up again: the folder is removed then, too.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{PREFIX}{variant_id}"
    with folder.with_suffix(".lock").open("a") as lock:
        if not _taken(lock):
            yield None
            return
        folder.mkdir(exist_ok=True)
        (folder / JOB).write_text(job_id or "", encoding="utf-8")
        try:
            yield folder
        except ProofFailed:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)


def sweep_variants(root: Path, *, unfinished: Collection[str] = ()) -> list[Path]:
    """Remove what nobody has taken up for ``KEPT_S``, but for the work of ``unfinished`` jobs; the folders removed."""
    removed = []
    for folder in root.glob(f"{PREFIX}*"):
        if (
            not folder.is_dir()
            or _job_of(folder) in unfinished
            or max(f.stat().st_mtime for f in (folder, *folder.rglob("*"))) > time.time() - KEPT_S
        ):
            continue
        with folder.with_suffix(".lock").open("a") as lock:
            if _taken(lock):
                shutil.rmtree(folder, ignore_errors=True)
                folder.with_suffix(".lock").unlink(missing_ok=True)
                removed.append(folder)
    return removed


def _job_of(folder: Path) -> str | None:
    file = folder / JOB
    return file.read_text(encoding="utf-8") if file.exists() else None


def _taken(lock: IO[str]) -> bool:
    """Take the lock, which the system frees at any death; whether it was free."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
