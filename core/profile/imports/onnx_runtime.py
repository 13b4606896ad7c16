"""ONNX Runtime's profile (``SessionOptions.enable_profiling``): Chrome-trace events, microseconds.

``model_run`` is a whole call; the first is cold and kept apart. ``Node`` events of the calls after it are summed by operator.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from core.profile.imports._found import Found, number, of_samples, stated

TITLE = "ONNX Runtime profile"
EXPECTED = "ONNX Runtime: a profile of SessionOptions.enable_profiling, with model_run events"
_LOADING = (
    "model_loading_array",
    "model_loading_uri",
    "model_loading_from_saved_proto",
    "session_initialization",
)


def matches(data: Any) -> bool:
    """Whether this is such a profile, of a session that was run at least once."""
    return isinstance(data, list) and any(
        isinstance(event, dict) and event.get("name") == "model_run" and "dur" in event for event in data
    )


def read(data: Any) -> list[Found]:
    """One for the whole profile; frames ``samples`` (iteration, value_ms, warmup) and ``operators``."""
    events = [event for event in data if isinstance(event, dict) and "dur" in event and "ts" in event]
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=lambda e: number(e["ts"], "ts"))
    times = [number(event["dur"], "model_run") / 1e3 for event in runs]
    metrics = [stated("first_forward_ms", times[0], "ms", "lower")]
    if times[1:]:
        metrics.insert(0, of_samples("latency_ms", times[1:], "ms", "lower"))
    loading = [number(e["dur"], "load") / 1e3 for e in events if e.get("name") in _LOADING]
    if loading:
        metrics.append(stated("load_ms", sum(loading), "ms", "lower"))
    after = runs[1]["ts"] if times[1:] else runs[0]["ts"]
    samples = pd.DataFrame(
        {"iteration": range(len(times)), "value_ms": times, "warmup": [i == 0 for i in range(len(times))]}
    )
    frames = {"samples": samples}
    kernels = [e for e in events if e.get("cat") == "Node" and e["ts"] >= after]
    if kernels:
        frames["operators"] = _operators(kernels, max(1, len(times) - 1))
    return [Found(tuple(metrics), {"device_model": None}, frames)]


def _operators(kernels: list[dict[str, Any]], calls: int) -> pd.DataFrame:
    """Columns operator, provider, calls and ms of one run of the model, longest first."""
    rows = [
        (
            e.get("args", {}).get("op_name", ""),
            e.get("args", {}).get("provider", ""),
            number(e["dur"], "dur") / 1e3,
        )
        for e in kernels
        if e.get("args", {}).get("op_name")
    ]
    frame = pd.DataFrame(rows, columns=["operator", "provider", "ms"])
    summed = frame.groupby(["operator", "provider"], as_index=False).agg(
        calls=("ms", "size"), ms=("ms", "sum")
    )
    return summed.assign(calls=summed["calls"] / calls, ms=summed["ms"] / calls).sort_values(
        "ms", ascending=False, ignore_index=True
    )
