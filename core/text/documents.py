"""Evaluation and calibration text as documents: Python's own reference prose, a file, or a hub data set.

Two promises, both tested. *Disjoint*: no paragraph of ``MIN_SHARED`` characters or more stands in two
documents, so nothing seen in calibration is met again in evaluation, and a bootstrap over documents resamples
independent things. (Topic names alone do not give that: CPython's ``compound`` topic contains ``try``, ``for``
and ``with`` word for word.) *Stable*: which half a document falls in depends on its own key only, so adding
text never moves a document from calibration to evaluation.

Knows nothing about tokens or models.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, get_args

from core.errors import BadInput, CannotOpen
from core.text._disjoint import MIN_SHARED, Split, digest, half, long_paragraphs, paragraphs
from core.text._files import read_text
from core.text.domains import load_domains
from core.types import Documents

__all__ = ["CHUNK_BYTES", "MIN_BYTES", "MIN_SHARED", "Split", "half", "load_documents", "paragraphs"]

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
            found = _chunks(read_text(path, "text file"))
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
    for number, line in enumerate(read_text(path, "text file").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise BadInput(f'{path} line {number} is not {{"text": "…"}}; give one such JSON object per line')
        yield _Keyed(text, text)


def _hub_rows(source: str) -> Iterator[_Keyed]:
    """Rows of a data set, streamed: nothing is run, and no more is fetched than is read."""
    import datasets

    from core.hub import hub_snapshot

    parts = source.removeprefix("hub:").split(":")
    if not parts[0] or len(parts) > 3:
        raise BadInput(
            f"text {source!r} is not understood; write hub:ID, hub:ID:SPLIT or hub:ID:CONFIG:SPLIT"
        )
    config = parts[1] if len(parts) == 3 else None
    wanted = parts[-1] if len(parts) > 1 else None
    try:
        if not Path(parts[0]).is_dir():  # one quick look: the loader below would retry for half a minute
            hub_snapshot(parts[0], kind="dataset", wanted=["README.md"])
        found = datasets.load_dataset(parts[0], config, streaming=True)
        if wanted is not None and wanted not in found:
            raise BadInput(f"{source}: no split {wanted!r}; there are: {', '.join(map(str, found))}")
        rows = found[wanted if wanted is not None else next(iter(found))]
        for row in islice(rows, MAX_ROWS):
            text = row.get("text")
            if not isinstance(text, str):
                raise BadInput(f"{source} has no text column named 'text'; its columns are: {', '.join(row)}")
            yield _Keyed(text, text)
    except BadInput:
        raise
    except CannotOpen as error:
        raise BadInput(f"{source}: {error}") from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = str(error).strip().split("\n")[0]
        raise BadInput(
            f"data set {source} cannot be read ({type(error).__name__}: {said}); check the id and the network, "
            "or give a local .txt or .jsonl file"
        ) from None


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


def _chunks(text: str) -> list[_Keyed]:
    """A running text as documents of at least ``CHUNK_BYTES`` where it can be cut; repeated paragraphs go."""
    seen: set[bytes] = set()
    chunks: list[str] = []
    block: list[str] = []
    for paragraph in paragraphs(text):
        long = long_paragraphs(paragraph)
        if long & seen:
            continue
        seen |= long
        block.append(paragraph)
        if sum(len(part.encode()) for part in block) >= CHUNK_BYTES:
            chunks.append("\n\n".join(block) + "\n")
            block = []
    chunks.append("\n\n".join(block) + "\n")
    return [_Keyed(chunk, chunk) for chunk in chunks if len(chunk.encode()) >= MIN_BYTES]
