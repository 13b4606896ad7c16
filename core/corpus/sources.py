"""Where rows come from: this Python's own text and code, a built-in set, files, or a hub data set.

What Slimscope measures quality on is never learned from: of ``pydoc`` the half that evaluation does not read is taken,
of the domains and ``stdlib`` the files that train. A user's own files are taken whole; ``leakage`` says whether they
hold what is measured on. Knows no tokenizer and no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from core.corpus.columns import as_rows, is_header, kind_of
from core.corpus.rows import Row, Rows
from core.errors import BadInput
from core.text._files import read_text
from core.text.disjoint import long_paragraphs
from core.text.documents import MIN_BYTES, chunks, load_documents
from core.text.domains import library
from core.text.labelled import load_labelled
from core.text.tables import TABLES, Record, hub_rows, read_table
from core.types import Documents

MAX_ROWS = 2_000_000
"""Rows read from one source at most: they are held in memory."""
CHOICES = (
    "pydoc, stdlib, domains, domain:NAME, builtin:NAME, a folder of texts, a .txt, .csv, .tsv, .jsonl or .parquet "
    "file, or hub:ID[:CONFIG][:SPLIT]"
)
AskedKind = Literal["auto", "text", "instruction", "labelled", "pairs"]


def open_rows(source: str, *, kind: AskedKind = "auto") -> Rows:
    """The rows of a source, in its order.

    ``kind`` says what to make of a table whose columns could be several things; ``auto`` goes by their names
    (``core.corpus.columns``). Raises ``BadInput`` in one sentence for anything that gives no rows.
    """
    if kind not in get_args(AskedKind):
        raise BadInput(f"rows of kind {kind!r} are not known; choose {', '.join(get_args(AskedKind))}")
    source = source.strip()
    rows = _named(source) or _of_file(source, kind)
    if not rows.rows:
        raise BadInput(f"{rows.name} has no document of at least {MIN_BYTES} bytes; give longer text")
    if kind not in ("auto", rows.kind):
        raise BadInput(f"{rows.name} has {rows.kind} rows, no {kind} rows; choose kind auto or {rows.kind}")
    return rows


def _named(source: str) -> Rows | None:
    """Rows that need no file of the user's; None for a path."""
    if source == "pydoc":
        return _of_documents(load_documents(source, split="calibration"))
    if source == "domains" or source.startswith("domain:"):
        return _of_documents(load_documents(source, split="train"))
    if source == "stdlib":
        return Rows("standard library of this Python", "text", _texts(library()), "PSF-2.0")
    if source.startswith("builtin:"):
        made = load_labelled(source)
        pairs = zip(made.texts, made.labels, strict=True)
        return Rows(source, "labelled", tuple(Row(text=text, label=label) for text, label in pairs))
    return None


def _of_file(source: str, kind: AskedKind) -> Rows:
    if source.startswith("hub:"):
        return _of_table(source, hub_rows(source, limit=MAX_ROWS + 1), kind)
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        return _of_folder(path)
    if suffix == ".txt":
        return Rows(path.name, "text", _texts(chunks(read_text(path, "text file"))))
    if suffix in TABLES:
        return _of_table(path.name, read_table(path, "data file", is_header=is_header), kind)
    raise BadInput(f"data {source!r} is not known; give {CHOICES}")


def _of_documents(documents: Documents) -> Rows:
    return Rows(documents.name, "text", _texts(documents.texts), documents.licence)


def _of_folder(folder: Path) -> Rows:
    """Every .txt file below a folder, each cut as one is alone; a paragraph that stood in an earlier one is left out."""
    files = sorted(folder.rglob("*.txt"))
    if not files:
        raise BadInput(f"folder {folder} has no .txt file; give {CHOICES}")
    seen: set[bytes] = set()
    found = []
    for file in files:
        for chunk in chunks(read_text(file, "text file")):
            long = long_paragraphs(chunk)
            if seen.isdisjoint(long):
                found.append(chunk)
            seen |= long
    return Rows(folder.name, "text", _texts(found))


def _of_table(name: str, records: Iterable[Record], kind: AskedKind) -> Rows:
    read = []
    for record in records:
        read.append(record)
        if len(read) > MAX_ROWS:
            raise BadInput(f"{name} has more than {MAX_ROWS:,} rows; give a part of it")
    if not read:
        raise BadInput(f"{name} has no rows; give a table with a header and rows")
    found, columns = kind_of(read, name=name, kind=kind)
    return Rows(name, found, as_rows(read, found, columns))


def _texts(texts: Iterable[str]) -> tuple[Row, ...]:
    return tuple(Row(text=text) for text in texts)
