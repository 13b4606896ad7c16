"""One side of a race, in a process of its own: started, warmed up, then timed a stretch at a time when it is its turn.

Between two requests it does nothing at all. It knows nothing of the other side.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from core.profile._measure import Bench
from core.profile.measured import Phase
from core.profile.runtimes._loading import create, settings_of
from core.types import Progress

_STARTED: list[Bench] = []
"""The one bench of this process, from the first request on."""


def answer(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """``{"do": "start", …}``, then ``stretch`` any number of times, then ``finish``; the last answers ``Measured``."""
    match request["do"]:
        case "start":
            return _start(request, progress)
        case "stretch":
            (bench,) = _STARTED
            steps = bench.phases[request["phase"]]
            stretch = bench.recorder.stretch(
                steps, seconds=request["seconds"], fewest=request["fewest_steps"]
            )
            return stretch.model_dump(mode="json")
        case _:
            (bench,) = _STARTED
            own, base = (Path(name) if name else None for name in (request["reference"], request["base"]))
            return bench.finish(own, base).model_dump(mode="json")


def _start(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Load, run once and warm up; says which phase will be timed, for a model that only reads its ``forward``."""
    settings = settings_of(request["runtime"], request["settings"])
    runtime = create(request["runtime"], settings, Path(request["files"]))
    start, longest = time.perf_counter(), settings.protocol().longest_s

    def notify(message: str) -> None:
        progress(min(time.perf_counter() - start, longest), longest, message)

    bench = Bench(runtime, Path(request["folder"]), settings, notify)
    bench.wait_until_quiet()
    bench.start()
    asked: Phase = request["phase"]
    phase = asked if asked in bench.phases else "forward"
    bench.recorder.warm_up(phase, bench.phases[phase])
    _STARTED.append(bench)
    return {"phase": phase}
