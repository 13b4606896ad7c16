"""Which rows a model learned from: kept beside its weights, so that no number is ever measured on them.

A row is named by the hash of what it asks (see ``core.corpus.rows``). Knows no rows; copies of the file go with every
variant made from the model.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from core.errors import CannotOpen

FILE = "learned_from.json"


@dataclass(frozen=True)
class Learned:
    """What one training read."""

    name: str
    source: str
    """How it was named, so that its held-out rows can be found again."""
    fingerprint: str
    """Of all rows of the source, those held out included."""
    questions: tuple[str, ...]
    """Hash (hex) of each training row's question, sorted."""


def read_learned(folder: Path) -> tuple[Learned, ...]:
    """What the model in this folder learned from, as far as it was trained here; raises ``CannotOpen`` if unreadable."""
    path = folder / FILE
    if not path.is_file():
        return ()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            Learned(e["name"], e["source"], e["fingerprint"], tuple(e["questions"])) for e in entries
        )
    except (ValueError, TypeError, KeyError) as error:
        raise CannotOpen(f"{path} cannot be read ({error}); remove it, or make the variant anew") from None


def written(learned: tuple[Learned, ...]) -> list[dict[str, object]]:
    """As JSON values."""
    return [asdict(one) for one in learned]
