"""The measuring loop's one-off timings: a device that works on after the call returned is waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from core.profile._recorder import Recorder
from core.profile.runtimes.torch_eager import TorchEagerSettings


class Device:
    """Returns at once and is busy for ``busy_s``, as a GPU is; a clock that waits for it."""

    busy_s = 0.2

    def __init__(self) -> None:
        self.until = 0.0

    def step(self) -> None:
        self.until = time.perf_counter() + self.busy_s

    def mark(self) -> float:
        return time.perf_counter()

    def resolve(self, marks: Sequence[tuple[Any, Any]]) -> list[float]:
        time.sleep(max(0.0, self.until - time.perf_counter()))
        return [(end - start) * 1e3 for start, end in marks]


def test_the_first_forward_counts_what_the_device_still_does() -> None:
    device = Device()
    recorder = Recorder(device, TorchEagerSettings().protocol(), lambda message: None)
    recorder.once("first_forward", device.step)
    (sample,) = recorder.samples
    assert sample.value_ms >= 1e3 * device.busy_s
