"""What to say when a training breaks: which update, which rows, what to change. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping

from core.distill.settings import TrainingSettings
from core.errors import CannotCompress


def broken(
    what: str,
    value: float,
    *,
    update: int,
    tokens: int,
    batch_hash: str,
    parts: Mapping[str, float],
    settings: TrainingSettings,
    resumable: bool,
) -> CannotCompress:
    """The error for a loss or gradient that is no number: where it happened, on which batch, and what to change."""
    wrong = [name for name, part in parts.items() if not math.isfinite(part)]
    of = f" ({', '.join(wrong)})" if wrong else ""
    kept = " The last checkpoint, from before, is kept." if resumable else ""
    return CannotCompress(
        f"the {what} became {value} in update {update}, after {tokens:,} tokens{of}; batch {batch_hash[:16]}. "
        f"{_advice(update, settings)}.{kept}"
    )


def _advice(update: int, settings: TrainingSettings) -> str:
    """What to change first, the likeliest cause first."""
    if update == 1:
        return (
            "Nothing was updated yet, so the rows or the models are the cause: open both in float32, and look at the "
            "rows of this batch in the data preview"
        )
    found = [f"lower learning_rate (now {settings.learning_rate:g})"]
    if not settings.clip:
        found.append("set clip to 1")
    if settings.precision == "bfloat16":
        found.append("use precision float32")
    if not settings.warmup:
        found.append("set warmup to 0.05")
    return f"To go on: {', or '.join(found)}"
