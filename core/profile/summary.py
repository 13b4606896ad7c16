"""From raw samples to headline numbers: medians with intervals, percentiles where n allows, and flags.

Pure: the same measurement gives the same result. Times come first and rates are their inverse, so a rate's
interval is the time's, turned over. Contended samples are left out of a median if enough clean ones remain; else
all are used and the run is flagged. No sample is ever dropped from the frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from core.profile import parity
from core.profile.measured import Measured, Phase
from core.profile.protocol import Protocol
from core.profile.quantiles import Interval, early_stopping_bound, quantile, smallest_n
from core.profile.runtimes._base import ProfileSettings
from core.types import Metric, Provenance, Result, View

PERCENTILES = (0.90, 0.99)


def summarise(measured: Measured, runtime: str, settings: ProfileSettings) -> Result:
    """Make the result of one measurement."""
    protocol = settings.protocol()
    frame = pd.DataFrame([sample.model_dump() for sample in measured.samples])
    frame["clock_mhz"] = frame["clock_mhz"].astype(float)
    used = {phase: _used(frame, phase, protocol) for phase in measured.phases}
    metrics = [*_speeds(used, protocol, measured), *_cold(frame), *_memory(measured)]
    if measured.parity is not None:
        metrics += parity.metrics(measured.parity)
    metrics = [replace(metric, name=metric.name + settings.suffix) for metric in metrics]
    view = View(
        "scatter",
        x="iteration",
        y="value_ms",
        color="phase",
        frame="samples",
        title="Every sample, in the order it was taken",
        unit="ms",
        log=True,
        tooltip=("warmup", "contended", "other_cpu"),
    )
    return Result(
        frames={"samples": frame},
        views=(view,),
        metrics=tuple(metrics),
        provenance=_provenance(measured, runtime, settings),
        notes=tuple(_notes(frame, used, measured, protocol)),
        flags=tuple(_flags(frame, used, measured, protocol)),
    )


def _used(frame: pd.DataFrame, phase: str, protocol: Protocol) -> pd.DataFrame:
    """The samples a phase's quantiles are made of."""
    warm = frame[(frame["phase"] == phase) & ~frame["warmup"]]
    clean = warm[~warm["contended"]]
    return clean if len(clean) >= protocol.smallest_clean else warm


def _speeds(used: dict[Phase, pd.DataFrame], protocol: Protocol, measured: Measured) -> Iterator[Metric]:
    tokens = protocol.batch * protocol.prompt_tokens
    for phase, rows in used.items():
        samples = rows["value_ms"].tolist()
        kind = "all (too few were clean)" if rows["contended"].any() else "clean"
        median = quantile(samples, 0.5)
        assert median is not None, f"{phase} has no samples"
        match phase:
            case "prefill":
                yield _rate("prefill_tokens_per_s", tokens, "tokens/s", median, kind)
                yield from _times("ttft", samples, median, kind)
            case "decode":
                yield _rate("decode_tokens_per_s", protocol.batch, "tokens/s", median, kind)
                yield from _times("tpot", samples, median, kind)
            case _:
                if measured.family == "vision":
                    yield _rate("images_per_s", protocol.batch, "images/s", median, kind)
                else:
                    yield _rate("prefill_tokens_per_s", tokens, "tokens/s", median, kind)
                yield from _times("latency", samples, median, kind)


def _rate(name: str, amount: int, unit: str, time_ms: Interval, kind: str) -> Metric:
    """Amount per second; the fast end of the time is the high end of the rate."""
    low, high = (amount * 1e3 / t if t is not None else None for t in (time_ms.high, time_ms.low))
    value = amount * 1e3 / time_ms.value
    return Metric(name, value, unit, "higher", time_ms.n, low, high, _interval_text(time_ms, "median", kind))


def _times(stem: str, samples: list[float], median: Interval, kind: str) -> Iterator[Metric]:
    """The median as ``<stem>_ms`` and the percentiles that n allows as ``<stem>_p90_ms`` …"""
    yield _time(f"{stem}_ms", median, "median", kind)
    for q in PERCENTILES:
        found = quantile(samples, q)
        if found is not None:
            yield _time(f"{stem}_p{q * 100:.0f}_ms", found, f"p{q * 100:.0f}", kind)


def _time(name: str, found: Interval, what: str, kind: str) -> Metric:
    text = _interval_text(found, what, kind)
    return Metric(name, found.value, "ms", "lower", found.n, found.low, found.high, text)


def _interval_text(found: Interval, what: str, kind: str) -> str:
    if found.low is None and found.high is None:
        count = f", alike in time: they count as {found.effective_n}" if found.effective_n < found.n else ""
        return f"none: {found.n} samples are too few{count}"
    one_sided = (
        "" if found.low is not None and found.high is not None else ", one-sided: n too small for the other"
    )
    neighbours = "" if found.effective_n == found.n else f", alike in time: they count as {found.effective_n}"
    return f"95 % order-statistics interval of the {what}, {found.n} {kind} samples{neighbours}{one_sided}"


def _cold(frame: pd.DataFrame) -> Iterator[Metric]:
    """What happens once in a process and so has no interval."""
    for phase, name in (("load", "load_ms"), ("first_forward", "first_forward_ms")):
        (value,) = frame.loc[frame["phase"] == phase, "value_ms"]
        yield Metric(name, float(value), "ms", "lower", 1, interval="none: once per process")


def _memory(measured: Measured) -> Iterator[Metric]:
    memory, facts = measured.memory, measured.facts
    peak = memory.peak_bytes if facts.device_peak_bytes is None else facts.device_peak_bytes
    values = {
        "peak_memory_bytes": peak,
        "host_peak_memory_bytes": None if facts.device_peak_bytes is None else memory.peak_bytes,
        "inference_peak_memory_bytes": memory.inference_peak_bytes,
        "baseline_memory_bytes": memory.baseline_bytes,
        "weights_memory_bytes": facts.weights_memory_bytes,
        "kv_cache_bytes": facts.kv_cache_bytes,
    }
    for name, value in values.items():
        if value is not None:
            yield Metric(name, float(value), "bytes", "lower", 1, interval="none: one reading per process")


def _flags(
    frame: pd.DataFrame, used: dict[Phase, pd.DataFrame], measured: Measured, protocol: Protocol
) -> Iterator[str]:
    if any(rows["contended"].any() for rows in used.values()):
        yield "contention"
    if measured.other_cpu_at_start > protocol.contended_share:
        yield "load_too_high"
    if not all(end.steady for end in measured.phases.values()):
        yield "no_steady_state"
    if any(_too_few(rows, protocol) for rows in used.values()):
        yield "n_too_small"
    if any(_frequency_fell(rows, protocol.frequency_drop) for rows in used.values()):
        yield "frequency_drop"
    if measured.parity is not None:
        yield from parity.flags(measured.parity)


def _too_few(rows: pd.DataFrame, protocol: Protocol) -> bool:
    """Whether a phase has fewer samples than its tier asks for, or too few for an interval of the median."""
    median = quantile(rows["value_ms"].tolist(), 0.5)
    return len(rows) < protocol.effort.min_samples or median is None or median.half_width is None


def _frequency_fell(rows: pd.DataFrame, limit: float) -> bool:
    """Whether the clock's median over the last quarter is lower than over the first by more than the limit."""
    clocks, quarter = rows["clock_mhz"].to_numpy(), max(1, len(rows) // 4)
    return bool(
        np.median(clocks[-quarter:]) < (1 - limit) * np.median(clocks[:quarter])
    )  # NaN compares as False


def _notes(
    frame: pd.DataFrame, used: dict[Phase, pd.DataFrame], measured: Measured, protocol: Protocol
) -> Iterator[str]:
    yield from measured.facts.notes
    if measured.parity is not None:
        yield from parity.notes(measured.parity)
    for phase, rows in used.items():
        warm = frame[(frame["phase"] == phase) & ~frame["warmup"]]
        left_out = len(warm) - len(rows)
        if left_out:
            yield f"{left_out} of {len(warm)} {phase} samples were contended and left out of the quantiles"
        if len(rows) < smallest_n(PERCENTILES[0]):
            yield f"{phase}: {len(rows)} samples are too few for a 90th percentile ({smallest_n(PERCENTILES[0])} needed)"
        for q in PERCENTILES:
            if (bound := early_stopping_bound(rows["value_ms"].tolist(), q)) is not None:
                yield (
                    f"{phase}: {q:.0%} take at most {bound:.4g} ms, with 99 % confidence for independent samples "
                    f"(MLPerf's early stopping, {len(rows)} samples)"
                )
    memory = measured.memory.baseline_bytes / 2**20
    peak = "peak_memory_bytes" if measured.facts.device_peak_bytes is None else "host_peak_memory_bytes"
    yield f"{peak} counts the whole process, of which Python and its libraries take {memory:.0f} MiB"
    yield "intervals are about this one process; another may settle elsewhere, so repeat before a close decision"
    yield "load_ms is with the files in the page cache and the libraries imported"


def _provenance(measured: Measured, runtime: str, settings: ProfileSettings) -> Provenance:
    protocol, facts = settings.protocol(), measured.facts
    return Provenance(
        method=runtime,
        settings=settings.model_dump(mode="json"),
        inputs={"files": measured.files},
        dtype=facts.dtype,
        device=settings.device_name,
        attention_kernel=facts.attention_kernel,
        protocol=str(protocol),
        conditions={
            **facts.conditions,
            "threads": settings.n_threads,
            "prompt_tokens": protocol.prompt_tokens,
            "new_tokens": protocol.new_tokens,
            "depth": settings.decode_depth,
            "batch": protocol.batch,
            "tier": protocol.tier,
            "protocol_hash": protocol.hash,
            "other_cpu_at_start": round(measured.other_cpu_at_start, 3),
            "load_average": measured.load_average,
            "ended_by": {phase: end.ended_by for phase, end in measured.phases.items()},
            "environment_hash": measured.environment["hash"],
            "environment": measured.environment,
        },
        seconds=measured.seconds,
    )
