"""What a compression did to every tensor: error, bytes before and after, touched or why not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.compress._targets import Target
from core.types import Metric, View

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = (
    "module", "layer", "projection", "component", "format", "bits", "group_size", "parameters",
    "bytes_before", "bytes_after", "relative_error", "sqnr_db", "touched", "reason",
)  # fmt: skip
VIEWS = (
    View(
        "heatmap", x="layer", y="projection", color="sqnr_db", title="Signal to quantization noise", unit="dB",
        tooltip=("module", "format", "relative_error", "bytes_after"),
    ),
    View(
        "table", x="module", text="format", title="Every tensor", tooltip=("bytes_before", "bytes_after", "reason")
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Error:
    """How far a weight is from what it was, over the whole tensor."""

    relative: float
    """‖Ŵ - W‖ / ‖W‖."""
    sqnr_db: float | None
    """10 · log10(‖W‖² / ‖Ŵ - W‖²); None where there is no noise or no signal to compare."""

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Error:
        """Of ``after`` against ``before``, both of any shape, summed in float32."""
        signal = float(before.float().norm())
        noise = float((after.float() - before.float()).norm())
        if noise == 0:
            return cls(0.0, None)
        return cls(noise / signal, 20 * math.log10(signal / noise))


def row(target: Target, parameter: Any, *, format_: str, bits: float, group_size: str, bytes_before: int,
        bytes_after: int, error: Error, touched: bool, reason: str) -> dict[str, Any]:  # fmt: skip
    """One tensor's line of the table."""
    inside = target.module.split(".")
    return {
        "module": target.module,
        "layer": target.layer,
        "projection": ".".join(part for part in inside[-2:] if not part.isdigit()),
        "component": target.component,
        "format": format_,
        "bits": bits,
        "group_size": group_size,
        "parameters": parameter.numel(),
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
        "relative_error": error.relative,
        "sqnr_db": error.sqnr_db,
        "touched": touched,
        "reason": reason,
    }


def table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The table, one line per stored parameter; ``layer`` is missing outside the blocks."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
    frame["layer"] = frame["layer"].astype("Int64")
    frame["sqnr_db"] = frame["sqnr_db"].astype("Float64")
    return frame


def headline(frame: pd.DataFrame) -> tuple[Metric, ...]:
    """How much of the model was touched, and what is stored; headers of the file not counted."""
    touched = frame[frame["touched"]]
    before, after = int(frame["bytes_before"].sum()), int(frame["bytes_after"].sum())
    return (
        Metric(
            "share_of_parameters_touched", _share(touched["parameters"], frame["parameters"]), "", "higher"
        ),
        Metric(
            "share_of_bytes_touched", _share(touched["bytes_before"], frame["bytes_before"]), "", "higher"
        ),
        Metric("bytes_before", before, "B", "neither"),
        Metric("bytes_after", after, "B", "lower"),
    )


def untouched_note(frame: pd.DataFrame) -> str:
    """One sentence on what was left as it was, the largest parts first; empty when nothing was."""
    left = frame[~frame["touched"]]
    if left.empty:
        return ""
    by_reason = left.groupby("reason")["bytes_before"].sum().sort_values(ascending=False)
    whole = frame["bytes_before"].sum()
    parts = [f"{reason} ({nbytes / whole:.1%} of bytes)" for reason, nbytes in by_reason.head(4).items()]
    return f"{len(left)} of {len(frame)} tensors were left as they were: {'; '.join(parts)}."


def _share(part: pd.Series, whole: pd.Series) -> float:
    return float(part.sum() / whole.sum())
