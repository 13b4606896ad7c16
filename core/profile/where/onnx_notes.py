"""ONNX Runtime's own notes of its calls as spans: the file that ``end_profiling`` leaves.

A JSON list of Chrome-trace events in µs: ``model_run`` of category Session is one call, ``…_kernel_time`` of category
Node one operator in it (https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.profile.where.spans import Span

_KERNEL = "_kernel_time"


def calls_of(file: Path) -> list[list[Span]]:
    """Per call, the span of the whole model and those of its operators, in order."""
    events = json.loads(file.read_text(encoding="utf-8"))
    runs = sorted(
        (_span("", "module", event) for event in events if event["name"] == "model_run"),
        key=lambda span: span.start_ns,
    )
    kernels = sorted(
        (
            _span(event["args"]["op_name"], "operator", event)
            for event in events
            if event["cat"] == "Node" and event["name"].endswith(_KERNEL)
        ),
        key=lambda span: span.start_ns,
    )
    found: list[list[Span]] = []
    position = 0
    for run in runs:
        inside = [run]
        while position < len(kernels) and kernels[position].start_ns < run.end_ns:
            if kernels[position].start_ns >= run.start_ns:
                inside.append(kernels[position])
            position += 1
        found.append(inside)
    return found


def _span(name: str, category: Any, event: Mapping[str, Any]) -> Span:
    start = int(event["ts"]) * 1000
    return Span(name, category, start, start + int(event["dur"]) * 1000)
