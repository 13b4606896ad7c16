"""Labelled texts for linear probes: a file of the user's, or a built-in set made from templates in code.

A group is what must not be met both in training and in testing, such as the noun a sentence is about: only then does
a probe's accuracy say that the model knows the label, and not that the probe knows the noun. Knows nothing about models.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import BadInput
from core.text._files import read_text
from core.text._templates import BUILTIN
from core.types import content_hash

MIN_ROWS = 20
MAX_ROWS = 5_000
MIN_PER_LABEL = 5
MAX_LABELS = 20
MIN_GROUPS = 5
NAMES = {
    "text": ("text", "sentence", "input"),
    "label": ("label", "class", "target"),
    "group": ("group", "source", "type"),
}
CHOICES = f"builtin:{', builtin:'.join(BUILTIN)}, or a .csv, .tsv or .jsonl file with text, label and optionally group"


@dataclass(frozen=True)
class Labelled:
    """Texts with a label each and the group each belongs to; the three tuples are of equal length."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    has_groups: bool
    """False where the source named none: each group is then the last word of its texts."""
    about: str = ""
    """What is labelled, in one sentence; empty for a user's file."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted(set(self.labels)))

    @property
    def fingerprint(self) -> str:
        """Content hash of all rows, in order."""
        return content_hash([self.texts, self.labels, self.groups])


def load_labelled(source: str) -> Labelled:
    """Read labelled texts: ``builtin:NAME`` or a file.

    Raises ``BadInput`` in one sentence for a source that is missing, not UTF-8, without the columns, or too poor to
    train a probe on (one label, too few rows, too few groups).
    """
    source = source.strip()
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in BUILTIN:
            raise BadInput(f"there is no built-in set {name!r}; give {CHOICES}")
        about, make = BUILTIN[name]
        texts, labels, groups = zip(*make(), strict=True)
        return Labelled(source, texts, labels, groups, has_groups=True, about=about)
    path = Path(source).expanduser()
    if not source or path.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
        raise BadInput(f"labelled data {source!r} is not known; give {CHOICES}")
    content = read_text(path, "labelled file")
    rows = list(_json_rows(path, content) if path.suffix.lower() == ".jsonl" else _table_rows(path, content))
    return _checked(path.name, rows)


def last_word(text: str) -> str:
    """The last word of a text in lower case, without punctuation around it; the whole text where it has none."""
    words = [word for word in (part.strip(".,;:!?\"'()[]…«»") for part in text.lower().split()) if word]
    return words[-1] if words else text


def _checked(path: str, rows: list[tuple[str, str, str]]) -> Labelled:
    """The rows as ``Labelled``, or a refusal that says what is missing."""
    if len(rows) < MIN_ROWS:
        raise BadInput(f"{path} has {len(rows)} labelled texts; a probe needs at least {MIN_ROWS}")
    if len(rows) > MAX_ROWS:
        raise BadInput(f"{path} has {len(rows):,} labelled texts; give at most {MAX_ROWS:,}")
    counts = Counter(label for _, label, _ in rows)
    if len(counts) < 2:
        raise BadInput(
            f"all {len(rows)} texts of {path} have the label {next(iter(counts))!r}; a probe needs two classes"
        )
    if len(counts) > MAX_LABELS:
        raise BadInput(
            f"{path} has {len(counts)} different labels, more than {MAX_LABELS}; is the label column the right one?"
        )
    rare, n = min(counts.items(), key=lambda item: item[1])
    if n < MIN_PER_LABEL:
        raise BadInput(
            f"label {rare!r} of {path} has {n} texts; every label needs at least {MIN_PER_LABEL}: add some or leave it out"
        )
    named = {group for _, _, group in rows}
    if "" in named and len(named) > 1:
        number = next(i for i, row in enumerate(rows, start=1) if not row[2])
        raise BadInput(
            f"labelled text {number} of {path} has no group, others have; give all a group, or none"
        )
    has_groups = named != {""}
    texts, labels, groups = zip(*rows, strict=True)
    if not has_groups:
        groups = tuple(map(last_word, texts))
    if len(set(groups)) < MIN_GROUPS:
        what = "groups" if has_groups else "different last words, which stand in for the missing group column"
        raise BadInput(
            f"{path} has {len(set(groups))} {what}; testing on unseen ones needs at least {MIN_GROUPS}: "
            "add a group column that names what must not be learned by heart, such as the sentence's noun"
        )
    return Labelled(path, texts, labels, groups, has_groups=has_groups)


def _table_rows(path: Path, content: str) -> Iterator[tuple[str, str, str]]:
    """Rows of a .csv (quoted as spreadsheets do) or .tsv (quotes are ordinary characters) with a header row."""
    lines = io.StringIO(content, newline="")
    tabs = path.suffix.lower() == ".tsv"
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines)
    header = [cell.strip().lower() for cell in next(reader)]
    text, label, group = (
        next((header.index(n) for n in known if n in header), None) for known in NAMES.values()
    )
    if text is None or label is None:
        raise BadInput(f"{path} has the columns {', '.join(header)}; its first row must name text and label")
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            cells = [
                row[index] if index is not None and index < len(row) else "" for index in (text, label, group)
            ]
            yield _row(path, reader.line_num, *cells)
    except csv.Error as error:
        raise BadInput(
            f"{path} line {reader.line_num} cannot be read as a table ({error}); check its quotes"
        ) from None


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise BadInput(
                f'{path} line {number} is not {{"text": "…", "label": "…"}}; give one such object per line'
            )
        text, label, group = (next((row[n] for n in known if n in row), "") for known in NAMES.values())
        if not isinstance(text, str) or isinstance(label, list | dict) or isinstance(group, list | dict):
            raise BadInput(
                f"{path} line {number}: text must be a string, label and group a string or a number"
            )
        yield _row(path, number, text, str(label), str(group))


def _row(path: Path, number: int, text: str, label: str, group: str) -> tuple[str, str, str]:
    if not text.strip() or not label.strip():
        missing = "text" if not text.strip() else "label"
        raise BadInput(f"{path} line {number} has no {missing}; every line needs a text and a label")
    return text.strip(), label.strip(), group.strip()
