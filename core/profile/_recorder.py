"""Taking samples: warm up until steady, time steps, read the neighbours meanwhile. The only loop that times anything.

It knows a clock, a protocol and steps to call; nothing of models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from core.profile.contention import ContentionMeter, clock_mhz
from core.profile.measured import Phase, PhaseEnd, Sample, Stretch
from core.profile.protocol import Protocol
from core.profile.quantiles import quantile
from core.profile.runtimes._base import Clock
from core.profile.steady import is_steady

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Steps:
    """What a phase does: ``before`` each block of ``repeats`` steps, untimed, then the steps."""

    step: Callable[[], None]
    before: Callable[[], None] | None = None
    repeats: int = 1


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


class Recorder:
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

    def phase(self, phase: Phase, steps: Steps) -> None:
        """Time steps until they are steady, then until there are enough."""
        effort, series, meter = self._protocol.effort, _Series(phase), ContentionMeter()
        steady = self._warm_up(series, meter, steps)
        start, ended_by = time.perf_counter(), None
        while ended_by is None:
            if self._block(series, meter, steps, start + effort.phase_cap_s):
                self._notify(f"{phase}: {len(series.values_ms) - series.n_warmup} samples")
                ended_by = self._ended_by(series, time.perf_counter() - start)
        self.ends[phase] = PhaseEnd(steady=steady, ended_by=ended_by)
        self._finish(series, meter)

    def warm_up(self, phase: Phase, steps: Steps) -> None:
        """Time steps until they are steady or the cap is reached; stretches are measured afterwards."""
        series, meter = _Series(phase), ContentionMeter()
        steady = self._warm_up(series, meter, steps)
        self.ends[phase] = PhaseEnd(steady=steady, ended_by="enough")
        self._finish(series, meter)

    def stretch(self, steps: Steps, *, seconds: float, fewest: int) -> Stretch:
        """Time steps for so long and at least so many, after untimed ones that bring caches and clocks back."""
        if steps.before is not None:
            steps.before()
        steps.step()
        self._clock.resolve([])
        series, meter, end = _Series("decode"), ContentionMeter(), time.perf_counter() + seconds
        while time.perf_counter() < end or len(series.values_ms) < fewest:
            self._block(series, meter, steps, math.inf)
        self._close(series, meter)
        shares = series.other_cpu
        return Stretch(values_ms=tuple(series.values_ms), other_cpu=round(sum(shares) / len(shares), 4))

    def _warm_up(self, series: _Series, meter: ContentionMeter, steps: Steps) -> bool:
        """Whether it became steady before the cap."""
        effort = self._protocol.effort
        deadline, steady = time.perf_counter() + effort.warmup_cap_s, False
        while not steady and time.perf_counter() < deadline:
            if self._block(series, meter, steps, deadline):
                self._notify(f"{series.phase}: warming up, {len(series.values_ms)} iterations")
                steady = is_steady(series.values_ms, effort.warmup)
        series.n_warmup = len(series.values_ms)
        return steady

    def _block(self, series: _Series, meter: ContentionMeter, steps: Steps, deadline: float) -> bool:
        """Time ``repeats`` steps, fewer if the deadline passes; returns whether a contention span was closed.

        Decisions are taken only then: a shorter look would see nothing of the neighbours.
        """
        if steps.before is not None:
            steps.before()
        taken, marks, closed = len(series.values_ms), [], False
        for _ in range(steps.repeats):
            start = self._clock.mark()
            steps.step()
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

    def _close(self, series: _Series, meter: ContentionMeter) -> None:
        """Close the last span, no shorter than the others."""
        n = len(series.values_ms)
        if len(series.other_cpu) < n:
            time.sleep(max(0.0, self._protocol.contention_span_s - meter.elapsed_s()))
            series.close_span(meter, n=n)

    def _finish(self, series: _Series, meter: ContentionMeter) -> None:
        """Close the last span and keep every sample."""
        self._close(series, meter)
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
