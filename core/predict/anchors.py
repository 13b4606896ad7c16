"""What was measured on a device says how far its class is off there: own measurements scale a prediction.

A measured step of a known model, held against what the class predicts for that very step, gives a factor of time. The
runtime with the least time counts, at the measurement whose bytes are nearest to the model's, because small models live
on other terms (caches, calls) than large ones. This machine is a device too, once its roofs were measured.

Run conditions name a device by the measurements' suffix ``_on_<slug>``; runs of this machine by their environment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import psutil

from core.cpu import cpu_model
from core.devices.registry import MODELS_SHARE, Device, EngineClass, devices
from core.predict.classes import efficiencies
from core.predict.model import Shape
from core.predict.rate import step_seconds
from core.types import Progress, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog
    from core.profile.work import Step
    from core.types import Run

HERE = "this-machine"
_ON = re.compile(r"_on_(?P<slug>[a-z0-9][a-z0-9-]*)$")
NEEDED = ("method", "dtype", "batch", "prompt_tokens", "new_tokens")
"""Conditions without which it is not known what a step had to do."""


@dataclass(frozen=True)
class Observed:
    """One measured phase on a device, and the factor that it gives."""

    slug: str
    runtime: str
    model: str
    phase: str
    nbytes: float
    """Read by the step."""
    factor: float
    """Measured time over the class's predicted one."""


@dataclass(frozen=True)
class Anchor:
    """What own measurements say of a device."""

    slug: str
    engine: EngineClass
    runtime: str
    model: str
    """The measured one that is nearest."""
    decode: float | None
    """Factor on the time of a step; below 1 where the device does better than its class."""
    prefill: float | None
    n: int
    """Measured phases behind it."""

    @property
    def told(self) -> str:
        """Where it comes from, as a sentence's beginning."""
        return f"scaled by {self.model} as {self.runtime} measured it here"


def this_machine() -> Device | None:
    """This machine as a device, with its measured roofs as peaks; None where they were not measured (``slimscope machine``)."""
    from core.profile.machine import known_roofs

    roofs = known_roofs("cpu")
    if roofs is None:
        return None
    total = int(psutil.virtual_memory().total)
    return Device(
        slug=HERE,
        name=f"This machine ({cpu_model()})",
        kind="desktop",
        engines=("sbc_cpu",),  # the only class of processors with rows of several makers
        ram_bytes=total,
        usable_bytes=round(MODELS_SHARE * total),
        bandwidth=roofs.read_bytes_per_s(),
        fp32=roofs.flops_per_s("float32"),
        fp16=None,
        int8=None,
        power_w=None,
        source="measured here: read bandwidth and float32 products",
        confidence="medium" if roofs.flags else "high",
        as_of=roofs.taken_at[:10],
        transport="local",
    )


def known_devices() -> dict[str, Device]:
    """This machine, if its roofs are known, and every device of the registry."""
    here = this_machine()
    return {**({} if here is None else {HERE: here}), **devices()}


def observed(catalog: Catalog, progress: Progress = silent) -> list[Observed]:
    """Every measured phase of a model whose shape is known, on this machine and on devices of the registry."""
    known = known_devices()
    found = [*_here(catalog, progress), *_elsewhere(catalog)]
    return [
        seen
        for slug, step, model in found
        if slug in known and (seen := _held_against(known[slug], step, model))
    ]


def anchor_of(device: Device, shape: Shape, seen: Sequence[Observed]) -> Anchor | None:
    """The factor for a model on a device: of its fastest runtime, at the measured model nearest in bytes; None: unmeasured."""
    own = [one for one in seen if one.slug == device.slug]
    if not own or not device.engines:
        return None
    anchors = []
    for runtime in sorted({one.runtime for one in own}):
        of_runtime = [one for one in own if one.runtime == runtime]
        decode, prefill = (_nearest(of_runtime, phase, shape) for phase in ("decode", "prefill"))
        near = decode or prefill
        if near:
            anchors.append(
                Anchor(
                    slug=device.slug,
                    engine=device.engines[0],
                    runtime=runtime,
                    model=near[0].model,
                    decode=median(one.factor for one in decode) if decode else None,
                    prefill=median(one.factor for one in prefill) if prefill else None,
                    n=len(of_runtime),
                )
            )
    return min(anchors, key=lambda one: (one.decode is None, one.decode or one.prefill), default=None)


def _nearest(seen: Sequence[Observed], phase: str, shape: Shape) -> list[Observed]:
    """The measurements of a phase (a forward pass counts as a prompt) whose bytes are nearest to the model's."""
    phases = ("prefill", "forward") if phase == "prefill" else (phase,)
    of_phase = [one for one in seen if one.phase in phases and one.nbytes > 0]
    if not of_phase:
        return []
    apart = [abs(math.log(one.nbytes / shape.weights_read())) for one in of_phase]
    return [one for one, far in zip(of_phase, apart, strict=True) if far <= min(apart) + 0.05]


def _held_against(device: Device, step: Step, model: str) -> Observed | None:
    """A measured step over the class's prediction for the same bytes and multiplications.

    Where no row tells what share of its peak a prompt reaches, the whole peak is taken: the factor then says it all.
    """
    known = efficiencies().get(device.engines[0]) if device.engines else None
    pace = known.pace(device, assumed=None if step.phase == "decode" else 1.0) if known else None
    if pace is None or (step.phase != "decode" and pace.flops_per_s is None):
        return None  # its peak is not known, so nothing can be scaled
    expected = step_seconds(step.work.bytes, step.work.flops, step.n_layers, pace)
    return Observed(device.slug, step.runtime, model, step.phase, step.work.bytes, step.seconds / expected)


def _here(catalog: Catalog, progress: Progress) -> Iterator[tuple[str, Step, str]]:
    """Valid runs of this machine's processor; a busy machine says nothing of what it can do."""
    from core.profile.roofline import measured_steps

    for base in {variant.base_id for variant in catalog.variants()}:
        for variant, run, _, step in measured_steps(catalog, base, "cpu", progress):
            if not run.flags and _device_of(run) is None:
                yield HERE, step, variant.name


def _elsewhere(catalog: Catalog) -> Iterator[tuple[str, Step, str]]:
    """Valid runs that were taken on a device of the registry."""
    from core.profile.roofline import steps_of
    from core.profile.shapes import known_shape

    for variant in catalog.variants():
        for run in catalog.runs(variant.id):
            slug = _device_of(run) if run.kind == "profile" and not run.flags else None
            shape = known_shape(variant.fingerprint) if slug else None
            if slug and shape and all(name in run.conditions for name in NEEDED):
                for _, step in steps_of(run, shape):
                    yield slug, step, variant.name


def _device_of(run: Run) -> str | None:
    """The device that a run's measurements name; None for a run of this machine."""
    ends = (_ON.search(measurement.name) for measurement in run.measurements)
    return next((end["slug"] for end in ends if end), None)
