"""Content-addressed folders of files: named by what is in them, complete or absent, never half-written.

A folder's hash is the SHA-256 of the canonical JSON of {relative name: SHA-256 of the file}: a Merkle tree of
depth two. Knows no database: the catalog writes its row after ``admit`` returned, so a folder that a crash
left behind is never listed, and is taken up again when the same content comes back.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from core.durable import flush
from core.errors import BadInput, CatalogError
from core.types import content_hash

INCOMING = ".incoming-"
DAY_S = 86_400.0


@dataclass(frozen=True)
class Contents:
    """What a folder holds: its hash, its bytes, and each file's hash and bytes by relative name."""

    hash: str
    bytes: int
    files: dict[str, Any]


def read_contents(folder: Path) -> Contents:
    """Hash a folder; raises ``BadInput`` when it is missing, empty, or holds a link."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder; an artifact is a folder of files")
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise BadInput(f"{path} is a link; an artifact holds its own files: copy the target in")
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = {"sha256": digest, "bytes": path.stat().st_size}
    if not files:
        raise BadInput(f"{folder} is empty; an artifact holds at least one file")
    hash_ = content_hash({name: file["sha256"] for name, file in files.items()})
    return Contents(hash_, sum(file["bytes"] for file in files.values()), files)


class ArtifactStore:
    """The folder ``artifacts`` beside a catalog."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def incoming(self) -> Path:
        """A new empty folder on the store's own file system, in which an artifact may be prepared."""
        folder = self.root / f"{INCOMING}{os.getpid()}-{uuid4().hex}"
        folder.mkdir()
        return folder

    def admit(self, folder: Path) -> Contents:
        """Move a folder in under its hash, durably; the folder is gone afterwards."""
        contents = read_contents(folder)
        target = self.root / contents.hash
        if not target.exists():
            self._move(folder, target, contents)
        shutil.rmtree(folder, ignore_errors=True)  # the same content was here before, or it was copied over
        return contents

    def folder(self, hash_: str) -> Path:
        """Where an artifact's files are; raises ``CatalogError`` when they are not there any more."""
        path = self.root / hash_
        if not path.is_dir():
            raise CatalogError(
                f"the files of artifact {hash_[:12]} are missing under {self.root}; make the variant again"
            )
        return path

    def remove(self, hash_: str) -> None:
        """Delete an artifact's files: renamed away first, so that no half-deleted folder bears its name."""
        doomed = self.root / f"{INCOMING}{os.getpid()}-{uuid4().hex}"
        if (self.root / hash_).exists():
            (self.root / hash_).rename(doomed)
            shutil.rmtree(doomed)

    def discard(self, pid: int) -> None:
        """Remove what a process of this machine that is known to be dead had not finished."""
        for path in self.root.glob(f"{INCOMING}{pid}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def sweep(self, *, older_than_s: float = DAY_S) -> list[Path]:
        """Remove folders that a crash left half-written, unless young or of a living process."""
        limit = time.time() - older_than_s
        orphans = [
            path
            for path in self.root.glob(f"{INCOMING}*")
            if path.stat().st_mtime < limit
            and not psutil.pid_exists(int(path.name.removeprefix(INCOMING).split("-")[0]))
        ]
        for path in orphans:
            shutil.rmtree(path, ignore_errors=True)
        return orphans

    def _move(self, folder: Path, target: Path, contents: Contents) -> None:
        try:
            self._rename_durably(folder, target, contents)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copied = self.incoming()  # another file system: rename is not possible, so copy, then rename
            shutil.copytree(folder, copied, dirs_exist_ok=True)
            self._rename_durably(copied, target, contents)

    def _rename_durably(self, folder: Path, target: Path, contents: Contents) -> None:
        for name in contents.files:
            flush(folder / name)
        try:
            folder.replace(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return  # another process brought the same content in the meantime
        flush(self.root)
