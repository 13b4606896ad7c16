"""What must be said next to a variant, in words: smaller but slower, faster but broken, larger than its base, no smaller for its zeros.

Works on the rows of ``core.catalog.queries.tradeoff_frame`` and makes no number of its own. Bytes are counted, so they
are compared as they are; speeds only where the two 95 % intervals lie apart and neither run is flagged; quality by the
paired interval of the difference to the base on one text, which leaves no room for another text or another day.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from core.tradeoff import QUALITY_TOLERANCE, objective

Row = Mapping[str, Any]
"""One variant's columns, as ``tradeoff_frame`` names them; NaN or absent where nothing was measured."""

SAME_SIZE = 0.005
"""File headers and rounding: a size within this share of the base's is the base's."""
RUIN = 2.0
"""Broken: the perplexity at least doubled, or the score at most halved, even at the kinder end of the interval."""
SPEEDS = {"decode_tokens_per_s": "decode", "prefill_tokens_per_s": "prefill", "images_per_s": "images"}
SCORES = {"accuracy": "accuracy", "spearman": "Spearman"}
"""Measured against truth, with ``delta_<name>`` paired against the base."""
_MEASURED = [*SPEEDS, "kl", "delta_bits_per_byte", *(f"delta_{name}" for name in SCORES)]
_READ = (
    *("variant", "flagged", "bytes", "zero_share_of_matrices", "perplexity", "bits_per_byte", *SCORES),
    *(f"{name}{end}" for name in _MEASURED for end in ("", "_low", "_high")),
)


def verdicts(frame: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Variant → what must be said of it; variants of which there is nothing to say, and the base, are left out."""
    rows: list[Row] = frame.reindex(columns=list(_READ)).to_dict("records")  # type: ignore[assignment]
    is_base = frame["recipe"].isna().tolist()
    base = next((row for row, first in zip(rows, is_base, strict=True) if first), None)
    if base is None:
        return {}
    said = {
        str(row["variant"]): sentences(base, row)
        for row, first in zip(rows, is_base, strict=True)
        if not first
    }
    return {variant: words for variant, words in said.items() if words}


def sentences(base: Row, variant: Row) -> tuple[str, ...]:
    """What a reader must know before taking the variant for an improvement on ``base``; empty where nothing speaks against it."""
    change = _value(variant, "bytes") / _value(base, "bytes") - 1
    smaller = change < -SAME_SIZE
    slower, faster = _speeds(base, variant)
    harm = _harm(variant)
    said = []
    if not smaller:
        said += _not_smaller(base, variant, change)
    if slower:
        gain = "Smaller but slower" if smaller else "Slower than its base"
        said.append(f"{gain}: {'; '.join(slower)}.")
    if harm:
        gains = " and ".join(["smaller"] * smaller + ["faster"] * bool(faster))
        said.append(f"{gains.capitalize()} but {harm}." if gains else f"{harm[0].upper()}{harm[1:]}.")
    return tuple(said)


def _not_smaller(base: Row, variant: Row, change: float) -> list[str]:
    sizes = f"{_show(variant, 'bytes')} against {_show(base, 'bytes')}"
    zeros = _value(variant, "zero_share_of_matrices")
    masked = f"{zeros:.0%} of the values in its matrices are zero" if zeros > 0 else ""
    if change > SAME_SIZE:
        return [f"Larger than its base: {sizes}{f', though {masked}' if masked else ''}."]
    return [f"No smaller than its base: {masked}, and zeros take the room of any number."] if masked else []


def _speeds(base: Row, variant: Row) -> tuple[list[str], list[str]]:
    """Where it is slower, and where faster; intervals apart, both runs calm."""
    slower: list[str] = []
    faster: list[str] = []
    if any(row.get("flagged") is True for row in (base, variant)):
        return slower, faster
    for column, title in SPEEDS.items():
        low, high = _ends(variant, column)
        base_low, base_high = _ends(base, column)
        told = f"{title} {_with_interval(variant, column)} against {_with_interval(base, column)}"
        if high < base_low:
            slower.append(told)
        elif low > base_high:
            faster.append(told)
    return slower, faster


def _harm(variant: Row) -> str:
    """How its quality is worse than its base's beyond the paired interval; empty where that cannot be said."""
    low, _ = _ends(variant, "delta_bits_per_byte")
    if low > 0:
        now, was, kindest = _perplexities(variant, low)
        word = "broken" if now / kindest >= RUIN else "worse"
        if word == "worse" and _ends(variant, "kl")[0] <= QUALITY_TOLERANCE["kl"]:
            return ""  # every rounding costs a little; this may well be within what the page calls close
        more = _value(variant, "delta_bits_per_byte")
        perplexity = f"perplexity {_number(now)} against {_number(was)} on the same text, "
        return f"{word}: {perplexity if now > 0 else ''}{more:+.3g} bits per byte {_interval(variant, 'delta_bits_per_byte')}"
    for name, title in SCORES.items():
        _, high = _ends(variant, f"delta_{name}")
        if high < 0:
            now, fall = _value(variant, name), _value(variant, f"delta_{name}")
            word = "broken" if now <= (now - high) / RUIN else "worse"
            change = f"{fall:+.3g} {_interval(variant, f'delta_{name}')}"
            return f"{word}: {title} {now:.3g} against {now - fall:.3g} on the same data, {change}"
    return ""


def _perplexities(variant: Row, least: float) -> tuple[float, float, float]:
    """Perplexity of the variant, of its base on the same tokens, and the largest that the interval grants the base.

    Bits per byte and the log of perplexity are the same nats over bytes and over tokens, so their ratio is one number.
    """
    now, bits = _value(variant, "perplexity"), _value(variant, "bits_per_byte")
    if not (now > 0 and bits > 0):
        return math.nan, math.nan, math.nan
    per_bit = math.log(now) / bits
    worse = _value(variant, "delta_bits_per_byte")
    return now, math.exp((bits - worse) * per_bit), math.exp((bits - least) * per_bit)


# --- reading a row ------------------------------------------------------------------------------------


def _value(row: Row, column: str) -> float:
    value = row.get(column)
    return math.nan if value is None else float(value)


def _ends(row: Row, column: str) -> tuple[float, float]:
    """The 95 % interval; NaN ends, which no comparison separates, where there is none."""
    return _value(row, f"{column}_low"), _value(row, f"{column}_high")


def _show(row: Row, column: str) -> str:
    return objective(column).show(_value(row, column))


def _with_interval(row: Row, column: str) -> str:
    return f"{_show(row, column)} {_interval(row, column)}"


def _interval(row: Row, column: str) -> str:
    low, high = _ends(row, column)
    return f"({low:.3g} … {high:.3g})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
