"""Numbers as people read them: with a unit, the digits they deserve, and their interval.

Sizes are decimal (GB = 10⁹ bytes). Nothing here rounds a number that is stored or exported, only what is shown.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime

NONE = "–"
_ACRONYMS = {
    "kl": "KL",
    "kv": "KV",
    "moe": "MoE",
    "mlp": "MLP",
    "sqnr": "SQNR",
    "p": "probability",
    "bos": "BOS",
    "ov": "OV",
    "qk": "QK",
    "cls": "CLS",
    "pca": "PCA",
    "sae": "SAE",
    "fvu": "FVU",
    "ce": "CE",
}
_UNITS = {"nats": "nats", "bits": "bits", "ms": "ms", "bytes": "bytes", "db": "dB"}
_COUNTED = (
    "",
    "count",
    "tokens",
    "layers",
    "positions",
    "cells",
    "heads",
    "experts",
    "documents",
    "rows",
    "classes",
    "updates",
)
_SAID_BY_THE_NAME = ("share", "probability", "weight")
_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def size(n_bytes: float | None) -> str:
    """Bytes in B, kB, MB, GB or TB with three significant digits, e.g. ``269 MB``."""
    if n_bytes is None or math.isnan(n_bytes):
        return NONE
    for scale, prefix in _DECIMAL:
        if abs(n_bytes) >= scale * 0.9995:
            return f"{significant(n_bytes / scale)} {prefix}B"
    return f"{n_bytes:.0f} B"


def count(n: float | None) -> str:
    """A count in K, M or B (10³, 10⁶, 10⁹), e.g. ``134.5 M``; plain below ten thousand."""
    if n is None or math.isnan(n):
        return NONE
    if abs(n) < 1e4:
        return f"{n:,.0f}"
    scale, letter = next(pair for pair in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if abs(n) >= pair[0])
    return f"{n / scale:.1f} {letter}"


def significant(value: float, digits: int = 3) -> str:
    """``digits`` significant digits without an exponent between 0.0001 and a million."""
    if value == 0:
        return "0"
    if math.isnan(value) or math.isinf(value):
        return NONE if math.isnan(value) else ("∞" if value > 0 else "-∞")
    rounded = float(f"{value:.{digits - 1}e}")  # 0.9996 is 1.00, not 1.000
    magnitude = math.floor(math.log10(abs(rounded)))
    if not -4 <= magnitude < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def number(value: float | None, unit: str = "") -> str:
    """One number with its unit: bytes as sizes, fractions as percent, the rest with three digits."""
    if value is None or math.isnan(value):
        return NONE
    if unit in ("bytes", "byte", "B"):
        return size(value)
    if unit in ("%", "percent"):
        return f"{significant(value)} %"
    if unit in _COUNTED and float(value).is_integer():
        return f"{value:,.0f}" + (f" {unit}" if unit not in ("", "count") else "")
    if unit in _SAID_BY_THE_NAME:
        return significant(value)
    return f"{significant(value)} {short_unit(unit)}".rstrip()


def short_unit(unit: str) -> str:
    """The unit as it is written beside a number."""
    return {"tokens/s": "tok/s", "seconds": "s", "milliseconds": "ms"}.get(unit, unit)


def interval(low: float | None, high: float | None, unit: str = "") -> str:
    """A 95 % interval, e.g. ``0.0021 … 0.0034 nats``; a dash without one."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return NONE
    if unit in ("bytes", "byte", "B"):
        return f"{size(low)} … {size(high)}"
    return f"{significant(low)} … {significant(high)} {short_unit(unit)}".rstrip()


def seconds(duration: float | None) -> str:
    """A duration: ``12 ms``, ``3.4 s``, ``2 min 05 s``, ``1 h 12 min``."""
    if duration is None or math.isnan(duration):
        return NONE
    if duration < 1:
        return f"{duration * 1000:.0f} ms"
    if duration < 60:
        return f"{duration:.1f} s" if duration < 10 else f"{duration:.0f} s"
    minutes, rest = divmod(round(duration), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    """How long ago, in one unit: ``just now``, ``5 min ago``, ``3 h ago``, ``2 d ago``."""
    if moment is None:
        return NONE
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    passed = ((now or datetime.now(UTC)) - moment).total_seconds()
    if passed < 45:
        return "just now"
    for scale, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed >= scale:
            return f"{passed / scale:.0f} {unit} ago"
    return "1 min ago"


def label(column: str) -> str:
    """A column or setting name as a label: ``top_k`` → ``Top k``, ``kl_to_final_nats`` → ``KL to final (nats)``."""
    *words, last = column.split("_")
    unit = f" ({_UNITS[last]})" if words and last in _UNITS else ""
    text = " ".join(_ACRONYMS.get(word, word) for word in (words if unit else [*words, last]))
    return text[:1].upper() + text[1:] + unit
