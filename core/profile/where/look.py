"""Looks where the time of a model goes, in a fresh process, by any runtime that can tell.

Plain torch is looked at twice: with a clock around every module, step by step in turn with steps without it, so that
what looking costs is known; then once with torch's profiler for the operators. A runtime that runs a graph has no
modules and tells its operators itself (``TellsOperators``). No number from here is a speed: that is ``core.profile``'s.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from core.errors import BadInput, CannotMeasure
from core.models.anatomy import Anatomy
from core.models.anatomy_find import find_anatomy
from core.models.sizes import block_of, component_of
from core.profile._measure import at_depth, digest, make_inputs
from core.profile.built import built
from core.profile.contention import ContentionMeter
from core.profile.device_lock import exclusive
from core.profile.environment import environment
from core.profile.fresh import ask
from core.profile.runtimes._base import ProfileSettings
from core.profile.runtimes._loading import create, settings_of
from core.profile.where.spans import Span, nested
from core.profile.where.tables import (
    BETWEEN,
    Place,
    Places,
    by_component,
    event_table,
    module_table,
    operator_table,
)
from core.profile.where.torch_modules import timed, traced
from core.types import Progress, Provenance, Result, View, part_of

METHOD = "where_the_time_goes"
REPEATS, FEWEST, LONGEST_S = 15, 6, 20.0
"""Steps of each phase with clocks on, and as many without; no more than the fewest that give an interval after so long."""
WARM_UP = 3


@runtime_checkable
class TellsOperators(Protocol):
    """A runtime with a profiler of its own."""

    profiling: bool
    """To be set before ``load``."""

    def operators(self) -> list[list[Span]]:
        """Operators of every ``prefill`` and ``decode`` so far, one list per call, in order; asked once, at the end."""


@dataclass
class _Phase:
    """A step to be looked at, and what must run again before every ``repeats`` of it."""

    name: str
    step: Callable[[], None]
    before: Callable[[], None] | None = None
    repeats: int = 1
    done: int = 0

    def ready(self) -> None:
        """Run what must go before the next step, if anything."""
        if self.before is not None and self.done % self.repeats == 0:
            self.before()

    def timed_ms(self) -> float:
        """Run the step; call ``ready`` before, outside of whatever watches."""
        self.done += 1
        start = time.perf_counter()
        self.step()
        return (time.perf_counter() - start) * 1e3

    @property
    def calls(self) -> int:
        """Calls of the runtime so far."""
        return self.done + (0 if self.before is None else -(-self.done // self.repeats))


def where_the_time_goes(folder: Path, runtime: str, progress: Progress, settings: ProfileSettings) -> Result:
    """Frames ``modules``, ``operators``, ``events`` (``where.tables``) and ``components`` of an artifact in a runtime.

    Raises ``BadInput`` (no artifact, prompt too long), ``CannotMeasure`` (a runtime that cannot tell, or does not run
    here), ``MissingLibrary``, ``OutOfMemory``, ``WorkerDied``, and what ``progress`` raises.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no config.json; give the folder of a model saved by transformers")
    with exclusive(settings.device_name, progress):
        files = built(folder, runtime, settings, part_of(progress, 0.0, 0.3))
        said = ask(
            "core.profile.where.look",
            {
                "runtime": runtime,
                "folder": str(folder),
                "files": str(files),
                "settings": settings.model_dump(mode="json"),
            },
            part_of(progress, 0.3, 1.0),
            threads=settings.n_threads,
            message="starting a fresh process",
        )
    return _result(said, runtime, settings)


def answer(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What the looking process does: ``{"runtime", "folder", "files", "settings"}`` to frames and facts as JSON."""
    settings = settings_of(request["runtime"], request["settings"])
    runtime: Any = create(request["runtime"], settings, Path(request["files"]))
    if not isinstance(runtime, TellsOperators) and not hasattr(type(runtime), "model"):
        raise CannotMeasure(
            f"{request['runtime']} does not say where its time goes; look at the same model in torch_eager"
        )
    return look(runtime, Path(request["folder"]), settings, progress)


def look(runtime: Any, folder: Path, settings: ProfileSettings, progress: Progress) -> dict[str, Any]:
    """Run every phase in this process and tell what was seen."""
    started, protocol = time.perf_counter(), settings.protocol()
    prepared = runtime.prepare(folder)
    inputs = make_inputs(prepared, protocol)
    if isinstance(runtime, TellsOperators):
        runtime.profiling = True
    runtime.load()
    phases = [_Phase("forward", lambda: runtime.prefill(inputs))]
    if prepared.family == "decoder":
        deep = at_depth(inputs, prepared, protocol)
        phases = [
            _Phase("prefill", lambda: runtime.prefill(inputs)),
            _Phase("decode", runtime.decode, lambda: runtime.prefill(deep), protocol.new_tokens),
        ]
    meter, seen = ContentionMeter(), []
    for done, phase in enumerate(phases):
        progress(done, len(phases), f"looking at {phase.name}")
        seen.append(_modules_of(runtime, phase, settings) if hasattr(runtime, "model") else _repeated(phase))
    if isinstance(runtime, TellsOperators):
        seen = _told(runtime.operators(), phases, seen)
    facts = runtime.facts()
    answer = {
        "frames": {
            name: json.loads(pd.concat([each[name] for each in seen]).to_json(orient="split", index=False))
            for name in ("modules", "operators", "events")
        },
        "looking": {phase.name: each["looking"] for phase, each in zip(phases, seen, strict=True)},
        "step_ms": {phase.name: each["step_ms"] for phase, each in zip(phases, seen, strict=True)},
        "other_cpu": meter.share(),
        "dtype": facts.dtype,
        "attention_kernel": facts.attention_kernel,
        "kv_cache": facts.conditions.get("kv_cache", "model"),
        "weights_memory_bytes": facts.weights_memory_bytes,
        "files": digest(folder),
        "environment": environment(settings.device_name),
        "seconds": time.perf_counter() - started,
    }
    runtime.close()
    return answer


def _modules_of(runtime: Any, phase: _Phase, settings: ProfileSettings) -> dict[str, Any]:
    """Frames of one phase of a torch model, and what looking costs."""
    model = runtime.model
    places = places_of(model)
    for _ in range(WARM_UP):
        phase.ready()
        phase.timed_ms()
    plain: list[float] = []
    clocked: list[float] = []
    steps: list[list[Span]] = []
    started = time.perf_counter()
    while len(steps) < FEWEST or (len(steps) < REPEATS and time.perf_counter() - started < LONGEST_S):
        phase.ready()
        plain.append(phase.timed_ms())
        phase.ready()
        with timed(model, device=settings.device_name) as spans:
            clocked.append(phase.timed_ms())
        steps.append(nested(spans))
    phase.ready()
    with traced(model) as noted:
        phase.timed_ms()
    spans_of_one = nested(noted)
    return {
        "modules": module_table(phase.name, steps, places),
        "operators": operator_table(phase.name, spans_of_one, places),
        "events": event_table(phase.name, spans_of_one),
        "looking": median(clocked) / median(plain) - 1,
        "step_ms": median(plain),
    }


def _repeated(phase: _Phase) -> dict[str, Any]:
    """A phase of a runtime that keeps its own notes."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        phase.ready()
        times.append(phase.timed_ms())
    return {"step_ms": median(times[WARM_UP:]), "looking": None}


def _told(
    calls: Sequence[Sequence[Span]], phases: Sequence[_Phase], seen: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Frames from the notes of a runtime about all its calls: the last step of each phase stands for it."""
    found, end = [], 0
    for phase, each in zip(phases, seen, strict=True):
        end += phase.calls
        last = nested(calls[end - 1])
        tables = {
            "modules": module_table(phase.name, [], {}),
            "operators": operator_table(phase.name, last, {}),
            "events": event_table(phase.name, last),
        }
        found.append({**each, **tables})
    return found


def places_of(model: Any) -> Places:
    """Class, layer and component of every module of a torch model."""
    anatomy: Anatomy = find_anatomy(model)
    places = {}
    for path, module in model.named_modules():
        inside = f"{path}.weight"  # the names that components are known by are of parameters
        block = block_of(anatomy, inside)
        component = component_of(anatomy, inside) if path else "other"
        places[path] = Place(type(module).__name__, block.index if block else None, component)
    return places


def _result(said: dict[str, Any], runtime: str, settings: ProfileSettings) -> Result:
    frames = {name: _frame(split) for name, split in said["frames"].items()}
    frames["components"] = by_component(frames["modules"])
    views = (
        View("bar", x="component", y="self_ms", color="phase", frame="components", title="Time of a step", unit="ms"),
        View("table", x="module", frame="modules", title="By module"),
        View("table", x="operator", frame="operators", title="By operator, with a profiler looking on"),
    )  # fmt: skip
    return Result(
        frames=frames,
        views=views,
        provenance=Provenance(
            method=METHOD,
            settings=settings.model_dump(mode="json"),
            inputs={"files": said["files"]},
            dtype=said["dtype"],
            device=settings.device_name,
            attention_kernel=said["attention_kernel"],
            conditions={
                "runtime": runtime,
                "threads": settings.n_threads,
                "prompt_tokens": settings.prompt_tokens,
                "new_tokens": settings.new_tokens,
                "depth": settings.decode_depth,
                "batch": settings.batch,
                "kv_cache": said["kv_cache"],
                "weights_memory_bytes": said["weights_memory_bytes"],
                "step_ms": said["step_ms"],
                "looking": said["looking"],
                "other_cpu": round(said["other_cpu"], 3),
                "environment_hash": said["environment"]["hash"],
            },
            seconds=said["seconds"],
        ),
        notes=tuple(_notes(said)),
        flags=("contention",) if said["other_cpu"] > settings.protocol().contended_share else (),
    )


def _notes(said: dict[str, Any]) -> list[str]:
    costs = [f"{cost:+.1%} ({phase})" for phase, cost in said["looking"].items() if cost is not None]
    notes = [
        "operators were noted in a pass of their own, with a profiler that slows them; read their shares"
    ]
    if costs:
        notes.insert(0, f"the clocks around the modules changed a step's time by {', '.join(costs)}")
        notes.append(f"{BETWEEN} is Python and the way from one operator to the next, seen by the profiler")
    return notes


def _frame(split: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(split["data"], columns=split["columns"])
    return frame.astype({"layer": "Int64"}) if "layer" in frame else frame
