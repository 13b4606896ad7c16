"""Evaluation and calibration text as documents: Python's own reference prose, a file, or a hub data set.

Two promises, both tested. *Disjoint*: no paragraph of ``MIN_SHARED`` characters or more stands in two
documents, so nothing seen in calibration is met again in evaluation, and a bootstrap over documents resamples
independent things. (Topic names alone do not give that: CPython's ``compound`` topic contains ``try``, ``for``
and ``with`` word for word.) *Stable*: which half a document falls in depends on its own key only, so adding
text never moves a document from calibration to evaluation.

Knows nothing about tokens or models.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

from core.errors import BadInput
from core.text._files import read_text
from core.text.disjoint import MIN_SHARED, Split, digest, half, long_paragraphs, paragraphs
from core.text.domains import load_domains
from core.text.tables import hub_rows, read_table
from core.types import Documents

__all__ = [
    "CHUNK_BYTES",
    "MIN_BYTES",
    "MIN_SHARED",
    "Split",
    "chunks",
    "half",
    "load_documents",
    "paragraphs",
]

MIN_BYTES = 500
"""Shorter documents are left out: they would be all beginning and no context."""
CHUNK_BYTES = 4096
"""A ``.txt`` file is cut between paragraphs into documents of about this size."""
MAX_ROWS = 20_000
"""Rows read from a hub data set at most."""
CHOICES = "pydoc, domains, domain:NAME, a .txt or .jsonl file, or hub:ID[:CONFIG][:SPLIT]"


class _Keyed(NamedTuple):
    """A document and the key whose hash decides its half and its place."""

    key: str
    text: str


def load_documents(source: str, *, split: Split = "evaluation", limit: int | None = None) -> Documents:
    """The documents of one half of ``source``, in an order fixed by content.

    ``source`` is ``pydoc`` (CPython's ``pydoc_data.topics``; differs between Python versions, and its
    fingerprint with it), ``domains`` or ``domain:NAME`` (core.text.domains), a ``.txt`` file (cut between paragraphs into documents of about 4 KiB), a ``.jsonl``
    file (one object with ``"text"`` per line), or ``hub:ID[:CONFIG][:SPLIT]`` (rows of a data set by its
    ``text`` column; a local folder works as ID). ``limit`` keeps the first that many documents.
    Raises ``BadInput`` in one sentence for anything that is not usable text.
    """
    if split not in get_args(Split):
        raise BadInput(f"split {split!r} is not known; choose evaluation, calibration or train")
    if limit is not None and limit < 1:
        raise BadInput(f"limit {limit} is too small; ask for at least one document")
    if source.strip() == "domains" or source.strip().startswith("domain:"):
        return load_domains(source.strip(), split=split, limit=limit)
    if split == "train":
        raise BadInput(f"{source} has no half for training; only domains and domain:NAME have")
    name, licence, found = _read(source.strip())
    chosen = [document for document in found if half(document.key) == split]
    if not chosen:
        raise BadInput(
            f"{name} has no text for {split}: {len(found)} documents of at least {MIN_BYTES} bytes, all in the "
            f"other half; give more text (a few times {CHUNK_BYTES} bytes)"
        )
    chosen.sort(key=lambda document: digest(document.key))
    return Documents(name, split, tuple(document.text for document in chosen[:limit]), licence)


def _read(source: str) -> tuple[str, str, list[_Keyed]]:
    """Name, licence and disjoint documents of a source."""
    if source == "pydoc":
        name, licence = f"pydoc topics of Python {platform.python_version()}", "PSF-2.0"
        found = _without_repeats(_pydoc_topics())
    elif source.startswith("hub:"):
        name, licence = source, ""
        found = _without_repeats(_hub_rows(source))
    else:
        path = Path(source).expanduser()
        name, licence = path.name, ""
        if path.suffix == ".txt":
            found = [_Keyed(chunk, chunk) for chunk in chunks(read_text(path, "text file"))]
        elif path.suffix == ".jsonl":
            found = _without_repeats(_json_lines(path))
        elif path.is_dir():
            raise BadInput(f"text {source} is a folder; give {CHOICES}")
        else:
            raise BadInput(f"text {source!r} is not known; give {CHOICES}")
    if not found:
        raise BadInput(f"{name} has no document of at least {MIN_BYTES} bytes; give longer text")
    return name, licence, found


def _pydoc_topics() -> Iterator[_Keyed]:
    """CPython's language reference topics, shortest first, so that a topic is preferred to its collection."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        yield _Keyed(name, text.strip() + "\n")


def _json_lines(path: Path) -> Iterator[_Keyed]:
    for place, cells in read_table(path, "text file"):
        if not isinstance(text := cells.get("text"), str):
            raise BadInput(f'{place} is not {{"text": "…"}}; give one such JSON object per line')
        yield _Keyed(text, text)


def _hub_rows(source: str) -> Iterator[_Keyed]:
    for _, cells in hub_rows(source, limit=MAX_ROWS):
        text = cells.get("text")
        if not isinstance(text, str):
            raise BadInput(f"{source} has no text column named 'text'; its columns are: {', '.join(cells)}")
        yield _Keyed(text, text)


def _without_repeats(documents: Iterable[_Keyed]) -> list[_Keyed]:
    """Documents that are long enough and share no long paragraph with one kept before."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        long = long_paragraphs(document.text)
        if len(document.text.encode()) >= MIN_BYTES and seen.isdisjoint(long):
            seen |= long
            kept.append(document)
    return kept


def chunks(text: str) -> list[str]:
    """A running text as documents of at least ``CHUNK_BYTES`` where it can be cut; repeated paragraphs go."""
    seen: set[bytes] = set()
    found: list[str] = []
    block: list[str] = []
    for paragraph in paragraphs(text):
        long = long_paragraphs(paragraph)
        if long & seen:
            continue
        seen |= long
        block.append(paragraph)
        if sum(len(part.encode()) for part in block) >= CHUNK_BYTES:
            found.append("\n\n".join(block) + "\n")
            block = []
    found.append("\n\n".join(block) + "\n")
    return [chunk for chunk in found if len(chunk.encode()) >= MIN_BYTES]
