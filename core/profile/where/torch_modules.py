"""When each module of a torch model begins and ends, and which operators it calls: two ways of looking.

``timed`` gives every module a ``forward`` of its own that reads the clock before and after the real one, which costs
about a microsecond a module and nothing else. ``traced`` lets torch's profiler note every operator, which slows the
model by 5–50 % and more: it says what is called where, and is never a timing.

On a GPU a call returns before its kernels have run, so ``timed`` waits for them at both ends; small kernels then look
slower than they are together. That path was never run on a GPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from core.lazy import torch
from core.profile.where.spans import Span

Forward = Callable[..., Any]
_MODULE = "module "
"""Begins the name of a span that is one of ours and no operator."""
_OWN = ("profiler::", "ProfilerStep")


@contextmanager
def timed(model: Any, *, device: str = "cpu") -> Iterator[list[Span]]:
    """Collect the span of every module's every call while the block runs; the model is left as it was."""
    spans: list[Span] = []
    clock = _gpu_clock if device.startswith("cuda") else time.perf_counter_ns

    def with_times(path: str, forward: Forward) -> Forward:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            output = forward(*args, **kwargs)
            spans.append(Span(path, "module", start, clock()))
            return output

        return run

    with _replaced(dict(model.named_modules()), with_times):
        yield spans


@contextmanager
def traced(model: Any) -> Iterator[list[Span]]:
    """Fill a list with the spans of modules and operators of the calling thread, once the block has ended."""
    spans: list[Span] = []
    profiler = torch.profiler

    def with_mark(path: str, forward: Forward) -> Forward:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with profiler.record_function(_MODULE + path):
                return forward(*args, **kwargs)

        return run

    with (
        _replaced(dict(model.named_modules()), with_mark),
        profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile,
    ):
        yield spans
    events = [event for event in profile.events() if not event.name.startswith(_OWN)]
    # Autograd's and the pool's threads have events of their own, which lie in no module.
    thread = next((event.thread for event in events if event.name.startswith(_MODULE)), None)
    spans += [_span(event) for event in events if event.thread == thread]


def _span(event: Any) -> Span:
    start, end = round(event.time_range.start * 1e3), round(event.time_range.end * 1e3)
    if event.name.startswith(_MODULE):
        return Span(event.name.removeprefix(_MODULE), "module", start, end)
    return Span(event.name, "operator", start, end)


@contextmanager
def _replaced(modules: Mapping[str, Any], wrap: Callable[[str, Forward], Forward]) -> Iterator[None]:
    """Give each module ``wrap(path, forward)`` as its forward, and back again what it had."""
    before = {path: module.__dict__.get("forward") for path, module in modules.items()}
    for path, module in modules.items():
        module.forward = wrap(path, module.forward)
    try:
        yield
    finally:
        for path, module in modules.items():
            if before[path] is None:
                del module.forward
            else:
                module.forward = before[path]


def _gpu_clock() -> int:
    torch.cuda.synchronize()
    return time.perf_counter_ns()
