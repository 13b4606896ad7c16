"""Which of its original's experts a variant still has, as the variant's own files record it.

A step that removes experts says in its provenance (``conditions["kept_experts"]``: layer → the original's experts in
their new order) which it kept. Steps follow one another: a second one counts in what the first one left. It reads one
JSON file and guesses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

RECORD = "slimscope.json"
KEY = "kept_experts"


def kept_record(kept: Mapping[int, Sequence[int]]) -> dict[str, dict[str, list[int]]]:
    """The entry of a step's conditions that says which experts it kept."""
    return {KEY: {str(layer): list(map(int, experts)) for layer, experts in kept.items()}}


def kept_experts(folder: Path) -> dict[int, tuple[int, ...]] | None:
    """Block index → the original's number of each expert of a variant; None where its files do not say."""
    path = folder / RECORD
    if not path.is_file():
        return None
    kept: dict[int, tuple[int, ...]] | None = None
    for step in json.loads(path.read_text(encoding="utf-8")).get("steps", []):
        found: Mapping[str, list[int]] | None = step.get("conditions", {}).get(KEY)
        if found is None:
            continue
        now = {int(layer): tuple(experts) for layer, experts in found.items()}
        kept = (
            now if kept is None else {at: tuple(kept[at][e] for e in experts) for at, experts in now.items()}
        )
    return kept
