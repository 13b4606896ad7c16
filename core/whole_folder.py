"""A folder that appears complete or not at all: written beside its place, flushed, renamed, after the disk was asked."""

from __future__ import annotations

import errno
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.durable import flush
from core.errors import SlimscopeError

SPARE_BYTES = 16 << 20
"""Room for tokenizer and config files, asked for beside the weights."""


@contextmanager
def whole_folder(folder: Path, nbytes: int, *, refuse: type[SlimscopeError]) -> Iterator[Path]:
    """An empty folder that becomes ``folder`` when the block ends well, and is gone when it does not.

    Raises ``refuse`` where ``folder`` exists, or the disk has or gets no room for ``nbytes``.
    """
    if folder.exists():
        raise refuse(f"{folder} exists already; choose a folder that does not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    refuse_full_disk(folder, nbytes, refuse=refuse)
    incoming = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.incoming")
    incoming.mkdir()
    try:
        yield incoming
        for path in incoming.rglob("*"):
            if path.is_file():
                flush(path)
        incoming.rename(folder)
    except Exception as error:
        # safetensors reports a full disk as its own error, with the number only in the text.
        if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error):
            raise refuse(
                f"the disk of {folder.parent} became full while writing; nothing was kept. Free some space and retry"
            ) from error
        raise
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def refuse_full_disk(folder: Path, nbytes: int, *, refuse: type[SlimscopeError]) -> None:
    """Raise ``refuse`` where the disk that ``folder`` is or will be on has no room for ``nbytes``."""
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < nbytes + SPARE_BYTES:
        raise refuse(
            f"the disk of {place} has {free / 1e6:.0f} MB free but this needs {(nbytes + SPARE_BYTES) / 1e6:.0f} MB; "
            "free some space or choose another folder"
        )
