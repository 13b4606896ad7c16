"""optimum-benchmark's report: per stage (load_model, prefill, decode, per_token, forward) memory, latency, throughput, energy.

Latency has every sample, in seconds. ``decode`` is the time of a whole generation after the first token; ``per_token`` is
each token's. The workload is in another file of that program (benchmark_config.json) and so is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from core.profile.imports._found import Found, number, of_samples, stated
from core.types import Metric

TITLE = "optimum-benchmark"
EXPECTED = "optimum-benchmark: benchmark_report.json or benchmark.json with stages prefill, decode, forward …"
_TIMES = {
    "load_model": "load_ms",
    "load": "load_ms",
    "prefill": "ttft_ms",
    "per_token": "tpot_ms",
    "forward": "latency_ms",
}
_MEMORY = {"max_ram": "host_peak_memory_bytes", "max_allocated": "device_peak_memory_bytes"}
_SCALE = {"MB": 1e6, "MiB": 2**20, "s": 1e3, "ms": 1.0}


def matches(data: Any) -> bool:
    """Whether this is such a report, alone or in the whole benchmark's file."""
    stages = _stages(data)
    return bool(stages) and any(
        isinstance(stage, dict) and isinstance(stage.get("latency"), dict) for stage in stages.values()
    )


def _stages(data: Any) -> dict[str, Any]:
    report = data.get("report", data) if isinstance(data, dict) else {}
    return (
        {name: stage for name, stage in report.items() if name in (*_TIMES, "decode")}
        if isinstance(report, dict)
        else {}
    )


def read(data: Any) -> list[Found]:
    """One for the whole report."""
    metrics = [metric for name, stage in _stages(data).items() if stage for metric in _stage(name, stage)]
    peaks = [metric for metric in metrics if metric.name.endswith("memory_bytes")]
    highest = {
        metric.name: max((m for m in peaks if m.name == metric.name), key=lambda m: m.value)
        for metric in peaks
    }
    rest = [metric for metric in metrics if metric not in peaks]
    return [Found((*rest, *highest.values()), {"device_model": None})]


def _stage(name: str, stage: dict[str, Any]) -> Iterator[Metric]:
    latency, memory, throughput = (stage.get(part) or {} for part in ("latency", "memory", "throughput"))
    values = latency.get("values") or []
    scale = _SCALE.get(latency.get("unit", "s"), 1e3)
    if name in _TIMES and values:
        yield of_samples(_TIMES[name], [number(value, name) * scale for value in values], "ms", "lower")
    elif name == "decode" and throughput.get("unit") == "tokens/s":
        yield stated("decode_tokens_per_s", throughput.get("value"), "tokens/s", "higher")
    for key, metric in _MEMORY.items():
        if memory.get(key) is not None:
            value = number(memory[key], key) * _SCALE.get(memory.get("unit", "MB"), 1e6)
            yield stated(metric, value, "bytes", "lower")
