"""Labelled texts for linear probes: a file of the user's, or a built-in set made from templates in code.

A group is what must not be met both in training and in testing, such as the noun a sentence is about: only then does
a probe's accuracy say that the model knows the label, and not that the probe knows the noun. Knows nothing about models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import BadInput
from core.text._templates import BUILTIN
from core.text.tables import read_table
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
    return _checked(path.name, list(_rows(path)))


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


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """Text, label and group of each row."""

    def names_columns(header: list[str]) -> bool:
        if all(any(name in header for name in NAMES[role]) for role in ("text", "label")):
            return True
        raise BadInput(f"{path} has the columns {', '.join(header)}; its first row must name text and label")

    for place, cells in read_table(path, "labelled file", is_header=names_columns):
        text, label, group = (next((cells[n] for n in known if n in cells), "") for known in NAMES.values())
        if not isinstance(text, str) or isinstance(label, list | dict) or isinstance(group, list | dict):
            raise BadInput(f"{place}: text must be a string, label and group a string or a number")
        if not text.strip() or not str(label).strip():
            missing = "label" if text.strip() else "text"
            raise BadInput(f"{place} has no {missing}; every line needs a text and a label")
        yield text.strip(), str(label).strip(), str(group).strip()
