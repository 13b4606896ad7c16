"""Qualcomm AI Hub's perf.yaml: precision × component × device × runtime, a stated time or LLM rate each, no samples.

Files of quic/ai-hub-models since 2025 (``precisions: … components: … performance_metrics:``). A job that failed has no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from core.errors import BadInput
from core.profile.imports._found import Found, number, stated
from core.types import Metric

TITLE = "AI Hub perf"
EXPECTED = "Qualcomm AI Hub: perf.yaml with precisions, components and performance_metrics"


def matches(data: Any) -> bool:
    """Whether this is such a file."""
    return isinstance(data, dict) and isinstance(data.get("precisions"), dict)


def read(data: Any) -> list[Found]:
    """One per precision, component, device and runtime that has a number. Raises ``BadInput`` where none has."""
    found = []
    for precision, parts in data["precisions"].items():
        for component, part in _mapping(_mapping(parts).get("components")).items():
            for device, runtimes in _mapping(_mapping(part).get("performance_metrics")).items():
                for runtime, cell in _mapping(runtimes).items():
                    if metrics := tuple(_metrics(_mapping(cell))):
                        named = {"precision": precision, "component": component, "runtime": runtime}
                        unit = cell.get("primary_compute_unit")
                        found.append(
                            Found(metrics, {"report": named, "compute_unit": unit, "device_model": device})
                        )
    if not found:
        raise BadInput(f"this perf.yaml has no measured number; expected {EXPECTED}")
    return found


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _metrics(cell: dict[str, Any]) -> Iterator[Metric]:
    if (time := cell.get("inference_time_milliseconds")) is not None:
        yield stated("latency_ms", time, "ms", "lower")
    if (rate := cell.get("tokens_per_second")) is not None:
        yield stated("decode_tokens_per_s", rate, "tokens/s", "higher")
    if (first := _mapping(cell.get("time_to_first_token_range_milliseconds"))).get("min") is not None:
        yield stated(
            "ttft_ms", first["min"], "ms", "lower"
        )  # of a prompt within one chunk; max is of the longest
    if (peak := _mapping(cell.get("estimated_peak_memory_range_mb"))).get("max"):
        yield stated("peak_memory_bytes", number(peak["max"], "peak memory") * 2**20, "bytes", "lower")
