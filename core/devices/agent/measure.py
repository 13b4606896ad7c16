"""One job, from loading to the last sample: every sample and reading becomes a line, and no statistics are made here."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import time
from typing import Any, Callable  # noqa: UP035 - one that can be subscripted in Python 3.8

from . import engines, look

Write = Callable[["dict[str, Any]"], None]
CONTENDED = 0.10
LOOK_EVERY_S = 1.0
SPAN_S = 0.1


class CannotRun(Exception):
    """What stands in the way, in one sentence."""


def run(spec: dict[str, Any], folder: str, write: Write) -> None:
    """Measure and write lines: ``sample``, ``telemetry`` and at the end ``end``. Raises ``CannotRun``."""
    fit(spec)
    begun, others = time.time(), Others()
    time.sleep(0.3)
    busy = others.share()
    write({"telemetry": look.telemetry(), "throttled": look.said("vcgencmd", "get_throttled")})
    how = _llama_bench if spec["engine"] == "llama_bench" else _in_process
    phases, memory, facts = how(spec, folder, write)
    write({"telemetry": look.telemetry(), "throttled": look.said("vcgencmd", "get_throttled")})
    write(
        {
            "end": {
                "phases": phases,
                "memory": memory,
                "facts": facts,
                "host": look.host(),
                "software": look.software(),
                "other_cpu_at_start": busy,
                "load_average": os.getloadavg()[0],
                "seconds": time.time() - begun,
            }
        }
    )


def fit(spec: dict[str, Any]) -> None:
    """Refuse what would push the device into swapping. Raises ``CannotRun``."""
    free = look.memory()[1]
    if free is not None and spec["needs_bytes"] > free:
        raise CannotRun(
            f"the model needs about {spec['needs_bytes'] >> 20} MiB of memory and {free >> 20} MiB are free; "
            "close programs there, or take a smaller variant"
        )


class Others:
    """The share of all processors that other programs take, between two looks; 0 where the system hides it."""

    def __init__(self) -> None:
        self._last = self._now()
        self._share = 0.0

    def share(self) -> float:
        """Looks again only after a tenth of a second: the kernel counts in ticks of 10 ms."""
        now = self._now()
        span = now[0] - self._last[0]
        if span >= SPAN_S:
            mine = now[2] - self._last[2]
            total = (now[1] - self._last[1]) - mine
            self._share = min(1.0, max(0.0, total / span / (os.cpu_count() or 1)))
            self._last = now
        return self._share

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = os.times()
        fields = (look.read("/proc/stat") or "").split("\n")[0].split()[1:9]
        ticks = os.sysconf("SC_CLK_TCK")
        busy = sum(int(fields[i]) for i in (0, 1, 2, 5, 6, 7)) / ticks if len(fields) == 8 else 0.0
        return time.monotonic(), busy, times.user + times.system + times.children_user + times.children_system


def is_steady(values: list[float], window: int, tolerance: float, windows: int) -> bool:
    """Whether the medians of the last windows differ by less than the tolerance from one to the next."""
    needed = window * (windows + 1)
    if len(values) < needed:
        return False
    recent = values[-needed:]
    medians = [sorted(recent[i : i + window])[window // 2] for i in range(0, needed, window)]
    return all(abs(b / a - 1) < tolerance for a, b in itertools.pairwise(medians))


class Recorder:
    """Times steps of a phase: warm-up until steady, then samples until there are enough."""

    def __init__(self, effort: dict[str, Any], write: Write) -> None:
        self._effort, self._write, self._others, self._looked = effort, write, Others(), 0.0
        self._clock: float | None = None

    def once(self, phase: str, step: Callable[[], Any]) -> None:
        """A step that happens once."""
        self._sample(phase, 0, self._timed(step), False)

    def phase(
        self, phase: str, step: Callable[[], Any], again: Callable[[], Any], chunk: int
    ) -> dict[str, Any]:
        """Steps in chunks of ``chunk``, with ``again`` untimed before each; returns how it ended."""
        effort, count = self._effort, 0
        values: list[float] = []
        steady, begun = False, time.monotonic()
        warm: list[float] = []
        measuring_since = None
        while True:
            if count % chunk == 0:
                again()
            value = self._timed(step)
            self._sample(phase, count, value, measuring_since is None)
            count += 1
            now = time.monotonic()
            if measuring_since is None:
                warm.append(value)
                steady = is_steady(warm, effort["window"], effort["tolerance"], effort["windows"])
                if steady or (now - begun > effort["warmup_cap_s"] and len(warm) > 1):
                    measuring_since = now
                continue
            values.append(value)
            spent = now - measuring_since
            if len(values) >= effort["min_samples"] and spent >= effort["min_seconds"]:
                return {"steady": steady, "ended_by": "enough"}
            if spent > effort["phase_cap_s"]:
                return {"steady": steady, "ended_by": "time cap"}

    @staticmethod
    def _timed(step: Callable[[], Any]) -> float:
        begun = time.perf_counter_ns()
        step()
        return (time.perf_counter_ns() - begun) / 1e6

    def _sample(self, phase: str, iteration: int, value: float, warmup: bool) -> None:
        now = time.monotonic()
        if now - self._looked > LOOK_EVERY_S:
            reading = look.telemetry()
            self._clock, self._looked = reading["clock_mhz"], now
            self._write({"telemetry": reading})
        self._write({"sample": sample(phase, iteration, value, warmup, self._others.share(), self._clock)})


def sample(
    phase: str, iteration: int, value: float, warmup: bool, other: float, clock: float | None
) -> dict[str, Any]:
    """One timed iteration as the host reads it."""
    return {
        "phase": phase,
        "iteration": iteration,
        "value_ms": value,
        "warmup": warmup,
        "contended": other > CONTENDED,
        "other_cpu": other,
        "clock_mhz": clock,
    }


def _in_process(
    spec: dict[str, Any], folder: str, write: Write
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    engine, recorder = engines.create(spec, folder), Recorder(spec["effort"], write)
    before = _resident()
    prompt = engines.tokens(spec["vocab_size"], spec["batch"], spec["prompt_tokens"], spec["seed"])
    recorder.once("load", engine.load)
    recorder.once("first_forward", lambda: engine.prefill(prompt))
    first = "prefill" if spec["family"] == "decoder" else "forward"
    phases = {first: recorder.phase(first, lambda: engine.prefill(prompt), lambda: None, 1)}
    if spec["family"] == "decoder":
        deep = engines.tokens(spec["vocab_size"], spec["batch"], spec["depth"], spec["seed"])
        phases["decode"] = recorder.phase(
            "decode", engine.decode, lambda: engine.prefill(deep), spec["new_tokens"]
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = dict(engine.facts(), weights_memory_bytes=engine.weight_bytes())
    return phases, {"baseline_bytes": before, "peak_bytes": peak, "inference_peak_bytes": None}, facts


def _llama_bench(
    spec: dict[str, Any], folder: str, write: Write
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """llama.cpp's own program: a cold process for loading and first forward, then one for each phase."""
    program = look.llama_bench()
    if program is None:
        raise CannotRun("llama-bench is not there any more; " + look.INSTALL["llama_bench"])
    model, repeats = os.path.join(folder, "model.gguf"), str(spec["effort"]["min_samples"])
    base = [program, "-m", model, "-t", str(spec["threads"]), "-o", "json"]
    begun = time.perf_counter()
    cold = _answer([*base, "-p", str(spec["prompt_tokens"]), "-n", "0", "-r", "1", "--no-warmup"])
    first = cold["samples_ns"][0] / 1e6
    write({"sample": sample("load", 0, (time.perf_counter() - begun) * 1e3 - first, False, 0.0, None)})
    write({"sample": sample("first_forward", 0, first, False, 0.0, None)})
    work = {
        "prefill": (["-p", str(spec["prompt_tokens"]), "-n", "0"], 1),
        "decode": (["-p", "0", "-n", str(spec["new_tokens"]), "-d", str(spec["depth"])], spec["new_tokens"]),
    }
    for phase, (arguments, steps) in work.items():
        others = Others()
        found = _answer([*base, *arguments, "-r", repeats])
        other, reading = others.share(), look.telemetry()
        write({"telemetry": reading})
        for i, value in enumerate(found["samples_ns"]):
            write({"sample": sample(phase, i, value / 1e6 / steps, False, other, reading["clock_mhz"])})
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    ended = {phase: {"steady": True, "ended_by": "enough"} for phase in work}
    facts = {
        "dtype": spec["weights"],
        "attention_kernel": "llama.cpp",
        "weights_memory_bytes": int(cold.get("model_size") or sum(spec["sizes"].values())),
        "notes": [
            (
                f"llama-bench {cold.get('build_commit')}; a decode sample is the mean of {spec['new_tokens']} steps; it warms up by "
                "one run of its own"
            ),
            "load_ms is a whole fresh process but for its first forward",
        ],
    }
    return ended, {"baseline_bytes": 0, "peak_bytes": peak, "inference_peak_bytes": None}, facts


def _answer(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, close_fds=False, check=False)
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise CannotRun(f"llama-bench failed ({done.returncode}): {' '.join(words[-2:])}")
    return dict(json.loads(done.stdout)[0])


def _resident() -> int:
    pages = (look.read("/proc/self/statm") or "0 0").split()[1]
    return int(pages) * int(os.sysconf("SC_PAGE_SIZE"))
