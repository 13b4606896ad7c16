"""The measuring loop, the same for every runtime: quiet, load, first forward, warm up, measure.

Runs in a process of its own that did nothing else before. It knows a runtime's five verbs and a protocol; it
makes no statistics (``summary.py``) and decides nothing about validity beyond marking each sample.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.errors import BadInput, CannotMeasure
from core.profile.contention import ContentionMeter, clock_mhz, wait_until_quiet
from core.profile.environment import environment
from core.profile.measured import Measured, Memory, Phase, PhaseEnd, Sample
from core.profile.memory import peak_resident_bytes, reset_peak, resident_bytes
from core.profile.parity import check, refuse_another_model
from core.profile.protocol import Protocol
from core.profile.quantiles import quantile
from core.profile.runtimes._base import Clock, Prepared, ProfileSettings, Runtime
from core.profile.runtimes._loading import create, settings_of
from core.profile.steady import is_steady
from core.types import Progress

Notify = Callable[[str], None]


def answer(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What the measuring process does: ``{"runtime", "folder", "files", "settings"}`` to ``Measured`` as JSON."""
    settings = settings_of(request["runtime"], request["settings"])
    runtime = create(request["runtime"], settings, Path(request["files"]))
    start, longest = time.perf_counter(), settings.protocol().longest_s

    def notify(message: str) -> None:
        progress(min(time.perf_counter() - start, longest), longest, message)

    own, base = (Path(name) if name else None for name in (request["reference"], request["base"]))
    measured = measure(runtime, Path(request["folder"]), settings, notify=notify, reference=own, base=base)
    return measured.model_dump(mode="json")


def measure(
    runtime: Runtime,
    folder: Path,
    settings: ProfileSettings,
    *,
    notify: Notify,
    reference: Path | None = None,
    base: Path | None = None,
) -> Measured:
    """Measure one artifact from start to end, then hold its answers against the kept ones of itself and of its base.

    Raises ``BadInput`` or ``CannotMeasure``.
    """
    started, protocol = time.perf_counter(), settings.protocol()
    # 1) Ready: configuration, inputs, and the files read once, so that load_ms is of a warm page cache.
    prepared = runtime.prepare(folder)
    inputs = make_inputs(prepared, protocol)
    before_decode = inputs if prepared.family != "decoder" else at_depth(inputs, prepared, protocol)
    files = digest(folder)
    baseline = resident_bytes()

    # 2) Quiet, or said so.
    other_cpu = wait_until_quiet(protocol.contended_share, wait_s=protocol.effort.quiet_wait_s, notify=notify)
    if other_cpu > protocol.contended_share and settings.when_busy == "refuse":
        raise CannotMeasure(
            f"other programs take {other_cpu:.0%} of the processors (allowed: {protocol.contended_share:.0%}); "
            "stop them, or set when_busy=flag to measure and flag the result"
        )
    # 3) Cold: loading, then the first forward, which may unpack weights or compile kernels.
    notify("loading")
    recorder = _Recorder(runtime.clock, protocol, notify)
    recorder.once("load", runtime.load)
    notify("first forward")
    recorder.once("first_forward", lambda: runtime.prefill(inputs))
    load_peak = peak_resident_bytes()
    peak_was_reset = reset_peak()

    # 4) Warm, phase by phase.
    if prepared.family == "decoder":
        recorder.phase("prefill", lambda: runtime.prefill(inputs))
        recorder.phase(
            "decode",
            runtime.decode,
            before=lambda: runtime.prefill(before_decode),
            repeats=protocol.new_tokens,
        )
    else:
        recorder.phase("forward", lambda: runtime.prefill(inputs))
    peak = peak_resident_bytes()
    facts = runtime.facts()
    # 5) The same process answers real text, after everything that is timed or counted.
    held = None
    if reference is not None:
        notify("comparing its answers with the model's own")
        longest_s = protocol.effort.phase_cap_s
        held = check(runtime, prepared.family, settings, reference, base, longest_s=longest_s)
        refuse_another_model(held, facts, settings)
    runtime.close()
    return Measured(
        family=prepared.family,
        samples=tuple(recorder.samples),
        phases=recorder.ends,
        memory=Memory(
            baseline_bytes=baseline,
            peak_bytes=max(load_peak, peak),
            inference_peak_bytes=peak if peak_was_reset else None,
        ),
        facts=facts,
        environment=environment(settings.device_name),
        files=files,
        other_cpu_at_start=other_cpu,
        load_average=os.getloadavg()[0],
        seconds=time.perf_counter() - started,
        parity=held,
    )


def make_inputs(prepared: Prepared, protocol: Protocol) -> np.ndarray:
    """The fixed workload: seeded token ids [batch, prompt_tokens], or pixels [batch, C, H, W] in [−1, 1]."""
    random = np.random.default_rng(protocol.seed)
    if prepared.image_shape is not None:
        return random.uniform(-1, 1, (protocol.batch, *prepared.image_shape)).astype(np.float32)
    decoding = (protocol.depth or protocol.prompt_tokens) + protocol.new_tokens
    wanted = max(protocol.prompt_tokens, decoding if prepared.family == "decoder" else 0)
    if prepared.context_length is not None and wanted > prepared.context_length:
        raise BadInput(
            f"{wanted} tokens (prompt and new ones) do not fit into this model's context of "
            f"{prepared.context_length}; lower prompt_tokens, depth or new_tokens"
        )
    assert prepared.vocab_size is not None, "a text model has a vocabulary"
    return random.integers(0, prepared.vocab_size, (protocol.batch, protocol.prompt_tokens), dtype=np.int64)


def at_depth(inputs: np.ndarray, prepared: Prepared, protocol: Protocol) -> np.ndarray:
    """The prompt that decode steps follow: the prompt itself, or seeded ids [batch, depth]."""
    if not protocol.depth:
        return inputs
    assert prepared.vocab_size is not None, "a decoder has a vocabulary"
    shape = (protocol.batch, protocol.depth)
    return np.random.default_rng(protocol.seed).integers(0, prepared.vocab_size, shape, dtype=np.int64)


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of an artifact's configuration and weight files."""
    total = hashlib.sha256()
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            total.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


@dataclass
class _Series:
    """The samples of one phase while they are taken; shares and clocks lag behind the values by one span."""

    phase: Phase
    values_ms: list[float] = field(default_factory=list)
    other_cpu: list[float] = field(default_factory=list)
    clock_mhz: list[float | None] = field(default_factory=list)
    n_warmup: int = 0

    def close_span(self, meter: ContentionMeter, *, n: int) -> None:
        """Read the others' share since the last reading and give it to all samples up to the n-th."""
        missing = n - len(self.other_cpu)
        self.other_cpu += [meter.share()] * missing
        self.clock_mhz += [clock_mhz()] * missing

    def clean_ms(self, limit: float) -> list[float]:
        """Measured values that no other program disturbed, in order; samples of the open span not yet."""
        rows = zip(self.values_ms[self.n_warmup :], self.other_cpu[self.n_warmup :], strict=False)
        return [value for value, share in rows if share <= limit]


class _Recorder:
    """Takes samples phase by phase under a protocol."""

    def __init__(self, clock: Clock, protocol: Protocol, notify: Notify) -> None:
        self._clock = clock
        self._protocol = protocol
        self._notify = notify
        self.samples: list[Sample] = []
        self.ends: dict[Phase, PhaseEnd] = {}

    def once(self, phase: Phase, step: Callable[[], None]) -> None:
        """Time something that can happen only once in a process; by wall clock, since no device is up at its start."""
        series, meter, start = _Series(phase), ContentionMeter(), time.perf_counter()
        step()
        self._clock.resolve([])  # a GPU may still be at work when the call returns
        series.values_ms.append((time.perf_counter() - start) * 1e3)
        self._finish(series, meter)

    def phase(
        self,
        phase: Phase,
        step: Callable[[], None],
        *,
        before: Callable[[], None] | None = None,
        repeats: int = 1,
    ) -> None:
        """Time ``step`` until it is steady, then until there is enough; ``before`` each block of ``repeats``, untimed."""
        effort, series, meter = self._protocol.effort, _Series(phase), ContentionMeter()
        # 1) Warm up until steady or until the cap.
        deadline, steady = time.perf_counter() + effort.warmup_cap_s, False
        while not steady and time.perf_counter() < deadline:
            if self._block(series, meter, step, before, repeats, deadline):
                self._notify(f"{phase}: warming up, {len(series.values_ms)} iterations")
                steady = is_steady(series.values_ms, effort.warmup)
        series.n_warmup = len(series.values_ms)
        # 2) Measure until there is enough or until the cap.
        start, ended_by = time.perf_counter(), None
        while ended_by is None:
            if self._block(series, meter, step, before, repeats, start + effort.phase_cap_s):
                self._notify(f"{phase}: {len(series.values_ms) - series.n_warmup} samples")
                ended_by = self._ended_by(series, time.perf_counter() - start)
        self.ends[phase] = PhaseEnd(steady=steady, ended_by=ended_by)
        self._finish(series, meter)

    def _block(
        self,
        series: _Series,
        meter: ContentionMeter,
        step: Callable[[], None],
        before: Callable[[], None] | None,
        repeats: int,
        deadline: float,
    ) -> bool:
        """Time ``repeats`` steps, fewer if the deadline passes; returns whether a contention span was closed.

        Decisions are taken only then: a shorter look would see nothing of the neighbours.
        """
        if before is not None:
            before()
        taken, marks, closed = len(series.values_ms), [], False
        for _ in range(repeats):
            start = self._clock.mark()
            step()
            marks.append((start, self._clock.mark()))
            if meter.elapsed_s() >= self._protocol.contention_span_s:
                series.close_span(meter, n=taken + len(marks))
                closed = True
            if time.perf_counter() >= deadline:
                break
        series.values_ms += self._clock.resolve(marks)
        return closed

    def _ended_by(self, series: _Series, seconds: float) -> Literal["enough", "time cap"] | None:
        """Why to stop measuring, if so. Only clean samples count towards enough."""
        effort, clean = self._protocol.effort, series.clean_ms(self._protocol.contended_share)
        if len(clean) >= effort.min_samples and seconds >= effort.min_seconds:
            median = quantile(clean, 0.5)
            half_width = median.half_width if median else None  # None: they are too alike to give an interval
            if half_width is not None and half_width <= (effort.max_half_width or math.inf):
                return "enough"
        return "time cap" if seconds >= effort.phase_cap_s else None

    def _finish(self, series: _Series, meter: ContentionMeter) -> None:
        """Close the last span, no shorter than the others, and keep every sample."""
        n = len(series.values_ms)
        if len(series.other_cpu) < n:
            time.sleep(max(0.0, self._protocol.contention_span_s - meter.elapsed_s()))
            series.close_span(meter, n=n)
        rows = zip(series.values_ms, series.other_cpu, series.clock_mhz, strict=True)
        for iteration, (value, share, mhz) in enumerate(rows):
            self.samples.append(
                Sample(
                    phase=series.phase,
                    iteration=iteration,
                    value_ms=value,
                    warmup=iteration < series.n_warmup,
                    contended=share > self._protocol.contended_share,
                    other_cpu=round(share, 4),
                    clock_mhz=mhz,
                )
            )
