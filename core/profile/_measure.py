"""One artifact in one runtime, from nothing to measured: quiet, load, first forward, warm up, measure, answer.

Runs in a process of its own that did nothing else before. It knows a runtime's five verbs and a protocol; it
makes no statistics (``summary.py``) and decides nothing about validity beyond marking each sample. The stages are
``Bench``'s, so that a race of two (``_race_side.py``) goes through the same ones.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import BadInput, CannotMeasure
from core.profile._recorder import Notify, Recorder, Steps
from core.profile.contention import wait_until_quiet
from core.profile.environment import environment
from core.profile.measured import Measured, Memory, Parity, Phase
from core.profile.memory import peak_resident_bytes, reset_peak, resident_bytes
from core.profile.parity import check, refuse_another_model
from core.profile.protocol import Protocol
from core.profile.runtimes._base import Prepared, ProfileSettings, Runtime
from core.profile.runtimes._loading import create, settings_of
from core.types import Progress


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
    bench = Bench(runtime, folder, settings, notify)
    bench.wait_until_quiet()
    bench.start()
    for phase, steps in bench.phases.items():
        bench.recorder.phase(phase, steps)
    return bench.finish(reference, base)


class Bench:
    """An artifact in a runtime, taken through its stages in the order of the methods."""

    def __init__(self, runtime: Runtime, folder: Path, settings: ProfileSettings, notify: Notify) -> None:
        """Ready: configuration, inputs, and the files read once, so that load_ms is of a warm page cache."""
        self._started = time.perf_counter()
        self._runtime, self._settings, self._notify = runtime, settings, notify
        self._protocol = protocol = settings.protocol()
        self._prepared = runtime.prepare(folder)
        self.phases = phases_of(runtime, self._prepared, protocol)
        self._files = digest(folder)
        self._baseline = resident_bytes()
        self._other_cpu = 0.0
        self.recorder = Recorder(runtime.clock, protocol, notify)

    def wait_until_quiet(self) -> None:
        """Quiet, or said so; raises ``CannotMeasure`` where the settings refuse a busy machine."""
        limit = self._protocol.contended_share
        wait_s = self._protocol.effort.quiet_wait_s
        self._other_cpu = wait_until_quiet(limit, wait_s=wait_s, notify=self._notify)
        if self._other_cpu > limit and self._settings.when_busy == "refuse":
            raise CannotMeasure(
                f"other programs take {self._other_cpu:.0%} of the processors (allowed: {limit:.0%}); "
                "stop them, or set when_busy=flag to measure and flag the result"
            )

    def start(self) -> None:
        """Cold: loading, then the first forward, which may unpack weights or compile kernels."""
        self._notify("loading")
        self.recorder.once("load", self._runtime.load)
        self._notify("first forward")
        self.recorder.once("first_forward", next(iter(self.phases.values())).step)
        self._load_peak = peak_resident_bytes()
        self._peak_was_reset = reset_peak()

    def finish(self, reference: Path | None, base: Path | None) -> Measured:
        """What was measured; the process answers real text after everything that is timed or counted."""
        peak = peak_resident_bytes()
        facts, held = self._runtime.facts(), self._held(reference, base)
        if held is not None:
            refuse_another_model(held, facts, self._settings)
        self._runtime.close()
        return Measured(
            family=self._prepared.family,
            samples=tuple(self.recorder.samples),
            phases=self.recorder.ends,
            memory=Memory(
                baseline_bytes=self._baseline,
                peak_bytes=max(self._load_peak, peak),
                inference_peak_bytes=peak if self._peak_was_reset else None,
            ),
            facts=facts,
            environment=environment(self._settings.device_name),
            files=self._files,
            other_cpu_at_start=self._other_cpu,
            load_average=os.getloadavg()[0],
            seconds=time.perf_counter() - self._started,
            parity=held,
        )

    def _held(self, reference: Path | None, base: Path | None) -> Parity | None:
        if reference is None:
            return None
        self._notify("comparing its answers with the model's own")
        longest_s = self._protocol.effort.phase_cap_s
        family = self._prepared.family
        return check(self._runtime, family, self._settings, reference, base, longest_s=longest_s)


def phases_of(runtime: Runtime, prepared: Prepared, protocol: Protocol) -> dict[Phase, Steps]:
    """What is timed of a model, in order; the first phase's step is also the first forward."""
    inputs = make_inputs(prepared, protocol)
    read = Steps(lambda: runtime.prefill(inputs))
    if prepared.family != "decoder":
        return {"forward": read}
    deep = at_depth(inputs, prepared, protocol)
    return {
        "prefill": read,
        "decode": Steps(runtime.decode, lambda: runtime.prefill(deep), protocol.new_tokens),
    }


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
