"""Text of eight kinds that every machine with CPython has: what ``demo:moe`` learned, and what shows who does what.

Prose, Python, C and the Unicode code charts come from the interpreter's own files, so they differ between Python
versions (the fingerprint says so); arithmetic, JSON, SQL and dates are generated from a seed. A *file* (a module, a
header, a block of 256 characters, one seed) belongs to one split by the hash of its name alone; no paragraph of
``MIN_SHARED`` characters of an evaluation file stands in a calibration or training file. Pydoc topics that
``load_documents("pydoc")`` evaluates on are never trained on. Knows nothing about tokens or models.
"""

from __future__ import annotations

import ast
import inspect
import os
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from core.errors import BadInput
from core.text._generated import GENERATED
from core.text.disjoint import MIN_SHARED, Split, digest, half, long_paragraphs, paragraphs
from core.types import Documents

__all__ = ["DOMAINS", "MIN_SHARED", "documents_by_domain", "library", "load_domains", "part"]

EXTRACT_BYTES = 3072
"""An evaluation or calibration document is about this much from the middle of one file; training takes it all."""
EXTRACTS = 32
"""Evaluation and calibration documents of one domain at most."""
MIN_BYTES = 400
"""Shorter extracts are left out."""
N_SEEDS = 1536
"""Generated files of one domain; three quarters of them train."""
MIN_DOCSTRING = 200
"""A docstring of this many characters is prose, and taken out of the Python; shorter ones stay in the code."""
NOT_LIBRARY = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "encodings",
    "ensurepip",
}
UNNAMED_BLOCKS = (
    "CJK",
    "HANGUL SYLLABLE",
    "TANGUT IDEOGRAPH",
    "NUSHU",
    "KHITAN",
    "EGYPTIAN",
    "CUNEIFORM",
    "ANATOLIAN",
)
"""Characters whose names are a number or a long monotonous list."""


class _File(NamedTuple):
    """A file's name, which alone decides its split, and how to read its text."""

    name: str
    read: Callable[[], str]


def part(name: str) -> Split:
    """Which split the file of this name belongs to: an eighth evaluates, an eighth calibrates, the rest trains."""
    return {0: "evaluation", 1: "calibration"}.get(digest(name)[1] % 8, "train")  # type: ignore[return-value]


def documents_by_domain(
    *, split: Split = "evaluation", limit_bytes: int | None = None
) -> dict[str, Documents]:
    """Each domain's documents of one split, by domain in the order of ``DOMAINS``.

    ``limit_bytes`` keeps the first documents of each domain that fit in that many UTF-8 bytes together, at least one.
    A domain whose files this machine lacks (C headers, in some containers) is left out.
    """
    found = {name: load_domains(f"domain:{name}", split=split) for name in DOMAINS if _files(name)}
    return {name: _first_bytes(documents, limit_bytes) for name, documents in found.items()}


def load_domains(source: str, *, split: Split = "evaluation", limit: int | None = None) -> Documents:
    """The documents of ``domains`` (all, in turn) or ``domain:NAME``; raises ``BadInput`` for a name not in ``DOMAINS``.

    ``limit`` keeps the first that many documents.
    """
    if source == "domains":
        each = documents_by_domain(split=split)
        texts = [
            text for turn in zip_longest(*(found.texts for found in each.values())) for text in turn if text
        ]
        return Documents("domains", split, tuple(texts[:limit]), "PSF-2.0")
    name = source.removeprefix("domain:")
    if name not in _SOURCES:
        raise BadInput(
            f"no domain is called {name!r}; there are: {', '.join(DOMAINS)}, and domains for all of them"
        )
    texts = [text for _, text in _texts(name, split)]
    if not texts:
        raise BadInput(
            f"this machine has no text for domain:{name} (its files are not installed); choose another"
        )
    return Documents(f"domain:{name}", split, tuple(texts[:limit]), "" if name in GENERATED else "PSF-2.0")


@cache
def library() -> tuple[str, ...]:
    """The standard library's modules whole, docstrings included, of the files that train.

    A module that shares a long paragraph with one before it, or with evaluation or calibration text of ``python`` and
    ``prose``, loses that paragraph.
    """
    seen: set[bytes] = set()
    for domain in ("python", "prose"):
        for file in _files(domain):
            if _split_of(file.name) != "train":
                seen |= long_paragraphs(file.read())
    found = []
    for name, path in sorted(_modules(), key=lambda module: digest(module[0])):
        if part(name) == "train":
            text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
            long = long_paragraphs(text)
            found.append(text if seen.isdisjoint(long) else _unseen(text, seen))
            seen |= long
    return tuple(text for text in found if text.strip())


def _first_bytes(documents: Documents, limit_bytes: int | None) -> Documents:
    if limit_bytes is None:
        return documents
    kept: list[str] = []
    room = limit_bytes
    for text in documents.texts:
        room -= len(text.encode())
        if kept and room < 0:
            break
        kept.append(text)
    return Documents(documents.name, documents.split, tuple(kept), documents.licence)


@cache
def _texts(domain: str, split: Split) -> tuple[tuple[str, str], ...]:
    """(file, text) of one split, in an order fixed by the files' names; what an earlier split has is left out."""
    seen: set[bytes] = set()
    whole: list[tuple[str, str]] = []
    for each in ("evaluation", "calibration", "train"):
        files = sorted(
            (f for f in _files(domain) if _split_of(f.name) == each), key=lambda file: digest(file.name)
        )
        whole = [(file.name, _unseen(file.read(), seen)) for file in files]
        if each == split:
            break
    if split == "train":
        return tuple((name, text) for name, text in whole if text)
    extracts = ((name, _extract(text)) for name, text in whole)
    return tuple((name, text) for name, text in extracts if len(text.encode()) >= MIN_BYTES)[:EXTRACTS]


def _split_of(name: str) -> Split:
    """``part``, but a pydoc topic stays in the half that ``load_documents("pydoc")`` puts it in."""
    if not name.startswith("topic:"):
        return part(name)
    if half(name.removeprefix("topic:")) == "evaluation":
        return "evaluation"
    return "train" if part(name) == "train" else "calibration"


def _unseen(text: str, seen: set[bytes]) -> str:
    """The text without paragraphs that stood in a text before (licence headers, mostly); ``seen`` grows."""
    kept = []
    for paragraph in paragraphs(text):
        long = long_paragraphs(paragraph)
        if seen.isdisjoint(long):
            kept.append(paragraph)
        seen |= long
    return "\n\n".join(kept) + "\n" if kept else ""


def _extract(text: str) -> str:
    """About ``EXTRACT_BYTES`` from the middle, in whole lines: a file's beginning is much like any other's."""
    lines = text.split("\n")
    sizes = [len(line.encode()) + 1 for line in lines]
    start = 0
    before = (sum(sizes) - EXTRACT_BYTES) / 2
    while before > 0:
        before -= sizes[start]
        start += 1
    stop, room = start, EXTRACT_BYTES
    while stop < len(lines) and room > 0:
        room -= sizes[stop]
        stop += 1
    return "\n".join(lines[start:stop]).strip("\n") + "\n"


@cache
def _files(domain: str) -> tuple[_File, ...]:
    return tuple(_SOURCES[domain]())


@cache
def _modules() -> tuple[tuple[str, Path], ...]:
    """The standard library's modules, (name, path), without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [
            name for name in inner if name not in NOT_LIBRARY
        ]  # installed packages are many times the library
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return tuple((path.relative_to(root).as_posix(), path) for path in sorted(found))


@cache
def _code_and_prose(path: Path) -> tuple[str, str]:
    """A module without its long docstrings, and those docstrings where they are sentences, not sessions."""
    source = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    lines = source.split("\n")
    prose = []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and deliberately broken examples
        return "", ""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        said = ast.get_docstring(node, clean=False)
        if said is None or len(said) < MIN_DOCSTRING:
            continue
        place = node.body[0]
        for number in range(place.lineno - 1, place.end_lineno or place.lineno):
            lines[number] = "\0"
        if ">>>" not in said:
            prose.append(inspect.cleandoc(said))
    return "\n".join(line for line in lines if line != "\0"), "\n\n".join(prose)


def _code_of(path: Path) -> str:
    return _code_and_prose(path)[0]


def _prose_of(path: Path) -> str:
    return _code_and_prose(path)[1]


def _python() -> Iterator[_File]:
    for name, path in _modules():
        yield _File(name, partial(_code_of, path))


def _prose() -> Iterator[_File]:
    """Language reference topics, and the library's long docstrings; a module's two halves share its split."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        yield _File(f"topic:{name}", partial(str, text))
    for name, path in _modules():
        yield _File(name, partial(_prose_of, path))


def _c() -> Iterator[_File]:
    """CPython's own headers."""
    root = Path(sysconfig.get_path("include"))
    for path in sorted(root.rglob("*.h")):
        yield _File(
            path.relative_to(root).as_posix(),
            partial(path.read_text, encoding="utf-8", errors="replace"),
        )


def _unicode() -> Iterator[_File]:
    """Code charts: number and name of each character of a block of 256."""
    for block in range(0, 0x1FC00, 0x100):
        named = [(code, unicodedata.name(chr(code), "")) for code in range(block, block + 0x100)]
        rows = [f"{code:04X}  {name}" for code, name in named if name and not name.startswith(UNNAMED_BLOCKS)]
        if len(rows) > 16:
            yield _File(f"unicode/{block:04X}", partial("\n".join, rows))


def _generated(domain: str) -> Callable[[], Iterator[_File]]:
    def files() -> Iterator[_File]:
        for seed in range(N_SEEDS):
            name = f"{domain}/{seed}"
            yield _File(name, partial(GENERATED[domain], name, EXTRACT_BYTES))

    return files


_SOURCES: dict[str, Callable[[], Iterator[_File]]] = dict(
    chain(
        {"prose": _prose, "python": _python, "c": _c, "unicode": _unicode}.items(),
        ((domain, _generated(domain)) for domain in GENERATED),
    )
)
DOMAINS: tuple[str, ...] = tuple(_SOURCES)
"""prose, python, c, unicode (from CPython); arithmetic, json, sql, dates (generated)."""
