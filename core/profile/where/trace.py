"""Spans as a Chrome trace: a JSON file that Perfetto and chrome://tracing draw as a flame chart.

The format is Google's "Trace Event Format": complete events (``ph`` X) with microseconds, one process per phase, so
that phases lie under each other and each begins at 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd


def chrome_trace(models: Mapping[str, pd.DataFrame]) -> bytes:
    """The ``events`` frame of each model, by what it is called there, as the file's bytes (UTF-8 JSON)."""
    spans: list[dict[str, Any]] = []
    phases = [
        (title, phase, rows)
        for title, events in models.items()
        for phase, rows in events.groupby("phase", sort=False)
    ]
    for process, (title, phase, rows) in enumerate(phases):
        label = {"name": f"{phase} {title}".strip()}
        spans.append({"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": label})
        for row in rows.to_dict("records"):
            spans.append(
                {
                    "ph": "X",
                    "pid": process,
                    "tid": 0,
                    "name": row["name"] or "(whole model)",
                    "cat": row["category"],
                    "ts": row["start_us"],
                    "dur": row["duration_us"],
                    "args": {"module": row["module"]},
                }
            )
    return json.dumps({"traceEvents": spans, "displayTimeUnit": "ms"}, ensure_ascii=False).encode()
