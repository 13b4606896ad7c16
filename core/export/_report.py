"""What an export gives back: bytes by component, parity, what runs it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from core.export._parity import Parity
from core.models.loaded import LoadedModel
from core.registry import Settings
from core.types import Metric, Provenance, Result, View

COLUMNS = ("component", "format", "tensors", "parameters", "bytes", "relative_error")
"""``relative_error``: ‖Ŵ - W‖ / ‖W‖ over the component's values; missing where the runtime keeps them to itself."""
VIEWS = (
    View("bar", x="component", y="bytes", color="format", title="Bytes by component", unit="B"),
    View(
        "table", x="tokens", text="max_difference", frame="parity", title="Against the model",
        tooltip=("n", "largest_output", "relative_rms", "top1_agreement", "kl"),
    ),
)  # fmt: skip


def summed(rows: Sequence[Mapping[str, Any]], folder: Path) -> pd.DataFrame:
    """The byte report: rows of one tensor each, summed by component and format; what is left of the folder's bytes is
    the graph, the header, the tokenizer and the configs."""
    frame = pd.DataFrame(
        list(rows), columns=["component", "format", "parameters", "bytes", "noise", "signal"]
    )
    table = (
        frame.groupby(["component", "format"], sort=False)
        .agg(tensors=("bytes", "size"), **{name: (name, "sum") for name in ("parameters", "bytes")})
        .reset_index()
    )
    parts = frame.groupby(["component", "format"], sort=False)[["noise", "signal"]].sum(min_count=1)
    table["relative_error"] = (parts["noise"] / parts["signal"]).pow(0.5).to_numpy()
    rest = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - int(
        table["bytes"].sum()
    )
    left = {"component": "graph and companions", "format": "", "tensors": 0, "parameters": 0, "bytes": rest}
    return pd.concat([table, pd.DataFrame([left])], ignore_index=True)[list(COLUMNS)]


def exported(
    loaded: LoadedModel,
    method: str,
    settings: Settings,
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    parity: Parity,
    *,
    started: float,
    format_: str,
    runtime: str,
    files: Sequence[str],
    metrics: Sequence[Metric] = (),
    notes: Sequence[str] = (),
) -> Result:
    """The result of one export: ``files`` are the weights among what lies in ``folder``."""
    frame = summed(rows, folder)
    nbytes = sum((folder / name).stat().st_size for name in files)
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return Result(
        {"main": frame, "parity": parity.frame},
        VIEWS,
        (
            Metric("exported_bytes", nbytes, "B", "lower"),
            Metric("bits_per_weight", 8 * nbytes / parameters, "bit", "lower"),
            *parity.metrics(),
            *metrics,
        ),
        Provenance(
            method, settings.model_dump(mode="json"), loaded.fingerprint, dtype=loaded.dtype, device=loaded.device,
            conditions={"format": format_, "runtime": runtime, "files": list(files)},
            seconds=time.monotonic() - started,
        ),
        tuple(note for note in notes if note),
    )  # fmt: skip
