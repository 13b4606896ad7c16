"""Labelled pictures to measure a vision model on: the held-out digits, or a folder with one subfolder per class.

Knows nothing of models: a label is a class name, and the evaluation finds it among the model's classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from core.errors import BadInput
from core.images.digits import HELD_OUT, LICENCE, all_digits
from core.images.pictures import Picture, read_picture
from core.types import content_hash

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CHOICES = "digits, or a folder that has one subfolder of image files per class"


@dataclass(frozen=True)
class LabelledImages:
    """Pictures and the class each shows; read one by one, as a folder may not fit memory."""

    name: str
    sources: tuple[str, ...]
    """What ``read_picture`` takes."""
    labels: tuple[str, ...]
    fingerprints: tuple[str, ...]
    """Content hash of each picture."""
    licence: str = ""

    @property
    def fingerprint(self) -> str:
        """Content hash of all pictures and labels, in order."""
        return content_hash([self.fingerprints, self.labels])

    def read(self, start: int, stop: int) -> list[Picture]:
        """Some of the pictures; raises ``BadInput`` naming one that cannot be read."""
        return [read_picture(source) for source in self.sources[start:stop]]


def load_images(source: str, *, limit: int) -> LabelledImages:
    """The first ``limit`` pictures of ``digits`` (its held-out rows) or of a folder, classes taking turns.

    Raises ``BadInput`` in one sentence for anything else.
    """
    source = source.strip()
    if source == "digits":
        return _digits(limit)
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        raise BadInput(f"images {source!r} are not known; give {CHOICES}")
    return _folder(folder, limit)


def _digits(limit: int) -> LabelledImages:
    levels, labels = all_digits()
    rows = HELD_OUT[:limit]
    return LabelledImages(
        name=f"digits {rows.start} to {rows.stop - 1}",
        sources=tuple(f"digits:{row}" for row in rows),
        labels=tuple(str(labels[row]) for row in rows),
        fingerprints=tuple(hashlib.sha256(levels[row].tobytes()).hexdigest() for row in rows),
        licence=LICENCE,
    )


def _folder(folder: Path, limit: int) -> LabelledImages:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = {path.name: _files(path) for path in classes}
    turns = max((len(found) for found in files.values()), default=0)
    # Classes take turns, so that a limit keeps them balanced.
    ordered = [(found[n], label) for n in range(turns) for label, found in files.items() if n < len(found)][
        :limit
    ]
    if not ordered:
        raise BadInput(f"{folder} has no subfolder with image files ({', '.join(SUFFIXES)}); give {CHOICES}")
    return LabelledImages(
        name=folder.name,
        sources=tuple(str(path) for path, _ in ordered),
        labels=tuple(label for _, label in ordered),
        fingerprints=tuple(_hash(path) for path, _ in ordered),
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
