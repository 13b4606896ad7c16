"""What a compression did to every tensor: error, bytes before and after, touched or why not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.models.targets import Target
from core.types import Metric, View

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = (
    "module", "layer", "projection", "component", "format", "bits", "group_size", "parameters_before", "parameters",
    "parameters_touched", "bytes_before", "bytes_after", "relative_error", "sqnr_db", "touched", "reason",
)  # fmt: skip
"""``parameters_touched``: values of the tensor as it was before that are gone or were changed."""
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
    """‖Ŵ - W‖ / ‖W‖; NaN where W was zeros, as a new head's bias is."""
    sqnr_db: float | None
    """10 · log10(‖W‖² / ‖Ŵ - W‖²); None where there is no noise or no signal to compare."""

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Error:
        """Of ``after`` against ``before``, both of any shape, summed in float32."""
        signal = float(before.float().norm())
        noise = float((after.float() - before.float()).norm())
        if noise == 0:
            return cls(0.0, None)
        if signal == 0:
            return cls(math.nan, None)
        return cls(noise / signal, 20 * math.log10(signal / noise))


def row(target: Target, parameter: Any, *, format_: str, bits: float, group_size: str, bytes_before: int,
        bytes_after: int, error: Error, touched: bool, reason: str) -> dict[str, Any]:  # fmt: skip
    """One tensor's line of the table."""
    return {
        **place(target),
        "format": format_,
        "bits": bits,
        "group_size": group_size,
        "parameters_before": parameter.numel(),
        "parameters": parameter.numel(),
        "parameters_touched": parameter.numel() if touched else 0,
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
        "relative_error": error.relative,
        "sqnr_db": error.sqnr_db,
        "touched": touched,
        "reason": reason,
    }


def place(target: Target) -> dict[str, Any]:
    """Where a tensor is: the first columns of its line."""
    return {
        "module": target.module,
        "layer": target.layer,
        "projection": target.projection,
        "component": target.component,
    }


def table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The table, one line per stored parameter and per one that was removed; ``layer`` is missing outside the blocks."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
    frame["layer"] = frame["layer"].astype("Int64")
    frame["sqnr_db"] = frame["sqnr_db"].astype("Float64")
    return frame


@dataclass(frozen=True)
class Shares:
    """How much of the model before a recipe is not in the variant as it was."""

    parameters_before: int
    bytes_before: int
    parameters: float
    """Share of all parameters, 0–1."""
    bytes: float
    expert_parameters: float | None
    """Share of the routed experts' parameters; None for a model that had none."""

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Shares:
        """Of a recipe's table."""
        before, touched = frame["parameters_before"], frame["parameters_touched"]
        nbytes = frame["bytes_before"]
        expert = frame["component"] == "experts"
        changed_bytes = (nbytes * touched / before.where(before > 0, 1)).sum()
        n_expert = int(before[expert].sum())
        return cls(
            parameters_before=int(before.sum()),
            bytes_before=int(nbytes.sum()),
            parameters=float(touched.sum() / before.sum()),
            bytes=float(changed_bytes / nbytes.sum()),
            expert_parameters=float(touched[expert].sum() / n_expert) if n_expert else None,
        )


def headline(frame: pd.DataFrame) -> tuple[Metric, ...]:
    """How much of the model was touched, and what is stored; headers of the file not counted."""
    shares = Shares.of(frame)
    of_experts = (
        ()
        if shares.expert_parameters is None
        else (Metric("share_of_expert_parameters_touched", shares.expert_parameters, "", "higher"),)
    )
    return (
        Metric("share_of_parameters_touched", shares.parameters, "", "higher"),
        *of_experts,
        Metric("share_of_bytes_touched", shares.bytes, "", "higher"),
        Metric("bytes_before", shares.bytes_before, "B", "neither"),
        Metric("bytes_after", int(frame["bytes_after"].sum()), "B", "lower"),
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
