"""What every method that judges experts by a text says of those the text never reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def never_note(never: Mapping[int, Sequence[int]]) -> str:
    """Which experts the text never reached, a few of them by name; empty where it reached all."""
    if not never:
        return ""
    named = [f"{layer}:{expert}" for layer, experts in never.items() for expert in experts]
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return (
        f"{len(named)} experts were reached by no calibration token ({', '.join(named[:8])}{more}; layer:expert). They are "
        "not known to be useless, only unseen by this text: see calibration coverage, and calibrate on more or other text."
    )
