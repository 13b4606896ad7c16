"""What every runtime has in common: its settings, and the five verbs the measuring loop calls.

A runtime is one file beside this one. It says how to get a model ready, load it, run a prompt, run one more
token and let go. It knows nothing of warm-up, samples or statistics; the loop (``_measure.py``) knows nothing of
torch. A new runtime is a class with these verbs and a ``run`` registered with ``@method("profile")`` that calls
``profile_artifact``. Its module has, besides:

``LIBRARIES: tuple[str, ...]``
    Distributions it runs on, pinned in ``core.libraries.PINS``; () where ours are enough.
``create(settings, files: Path) -> Runtime``
    Makes one, in the measuring process. ``files`` is what ``build`` left, or the artifact's folder without one.
``build(folder, target, progress, settings) -> Mapping[str, Any]`` (optional)
    Converts the artifact into the runtime's own files inside the empty folder ``target``; returns JSON facts of
    them. It runs in a process of its own, once per artifact, settings named in ``BUILT_FROM``, and versions
    (``core.profile.built``).
``BUILT_FROM: tuple[str, ...]`` (with ``build``)
    Names of the settings that change those files.
``BUILD_VERSION: int`` (optional, 1)
    To be raised when ``build`` writes something else for the same settings, so that old files are not taken.
``FAMILIES: frozenset[Family]`` (optional, all)
    What it can run.
``unavailable() -> str`` (optional)
    Why it cannot run on this machine though its libraries are there (no GPU, no such program), in one sentence; empty
    if it can.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field

from core.cpu import physical_cores
from core.profile import protocol
from core.profile.measured import Facts
from core.profile.protocol import Tier
from core.registry import Settings
from core.types import Family

PLAIN = "torch_eager"
"""The runtime whose numbers need no name of their own."""
PARITY_PROMPT, PARITY_STEPS = 24, 16
"""Tokens read and then forced, one by one, when a runtime's answers are held against the artifact's own."""
PARITY_POSITIONS = PARITY_PROMPT + PARITY_STEPS


class ProfileSettings(Settings):
    """Settings of every runtime: the workload, how long to measure, and how many threads."""

    tier: Tier = Field(
        "quick", description="How long to measure: rapid (half a minute), quick (1–2 minutes), full (minutes)"
    )
    prompt_tokens: int = Field(256, ge=1, le=131072, description="Tokens per prompt")
    new_tokens: int = Field(32, ge=1, le=8192, description="Tokens generated after each prompt")
    batch: int = Field(1, ge=1, le=1024, description="Sequences at a time")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 takes all physical cores")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the fixed token ids")
    depth: int = Field(
        0,
        ge=0,
        le=131072,
        description="Tokens already in the cache when decoding is measured; 0 takes the prompt's. Other depths give "
        "numbers of their own names, e.g. decode_tokens_per_s_depth_2048",
    )
    parity: bool = Field(
        True, description="Hold the measured process's answers against the artifact's own, in float32"
    )
    when_busy: Literal["flag", "refuse"] = Field(
        "flag",
        description="What to do when other programs keep the machine busy: measure and flag, or refuse",
    )

    @property
    def n_threads(self) -> int:
        """Threads to use, with 0 resolved."""
        return self.threads or physical_cores()

    @property
    def device_name(self) -> str:
        """Where it runs; runtimes that offer a choice override this."""
        return "cpu"

    @property
    def runtime(self) -> str:
        """The id of the runtime these settings are of: the name of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def marks(self) -> tuple[str, ...]:
        """What else a runtime's numbers are named after: how it keeps the weights, where not as they are stored."""
        weights = getattr(self, "weights", "stored")
        return () if weights == "stored" else (weights,)

    @property
    def suffix(self) -> str:
        """What the numbers' names end in: nothing for plain torch at the prompt's depth, else what makes them others.

        One rule for all, so that no runtime's numbers ever stand where plain torch's are read:
        ``decode_tokens_per_s_openvino_int8``.
        """
        own = () if self.runtime == PLAIN else (self.runtime,)
        deep = (f"depth_{self.depth}",) if self.depth else ()
        return "".join(f"_{part}" for part in (*own, *self.marks, *deep))

    @property
    def decode_depth(self) -> int:
        """Tokens in the cache when the first decode step is timed."""
        return self.depth or self.prompt_tokens

    @property
    def n_positions(self) -> int:
        """Most positions that a sequence takes while it is measured or held against the artifact's own answers."""
        return max(self.prompt_tokens, self.decode_depth + self.new_tokens, PARITY_POSITIONS)

    def protocol(self) -> protocol.Protocol:
        """The protocol that these settings ask for."""
        return protocol.Protocol(
            tier=self.tier,
            effort=protocol.EFFORTS[self.tier],
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            batch=self.batch,
            seed=self.seed,
            depth=self.depth,
            parity=self.parity,
        )


@dataclass(frozen=True)
class Prepared:
    """What must be known of a model to make its inputs."""

    family: Family
    vocab_size: int | None
    """None for a vision model."""
    context_length: int | None
    """Most tokens it can take; None if it has no limit or is a vision model."""
    image_shape: tuple[int, int, int] | None = None
    """Channels, height, width of a vision model's input."""


class Clock(Protocol):
    """Marks moments cheaply while the work runs, and turns them into durations afterwards."""

    def mark(self) -> Any:
        """Note this moment on the device's own time line."""

    def resolve(self, marks: Sequence[tuple[Any, Any]]) -> list[float]:
        """Milliseconds between each pair of marks; waits for the device where it must."""


class WallClock:
    """For runtimes whose calls return when the work is done."""

    def mark(self) -> int:
        """Nanoseconds of the performance counter."""
        return time.perf_counter_ns()

    def resolve(self, marks: Sequence[tuple[int, int]]) -> list[float]:
        """Milliseconds between each pair."""
        return [(end - start) / 1e6 for start, end in marks]


class Runtime(Protocol):
    """Something that runs a model. The verbs are called in this order, ``prefill`` and ``decode`` repeatedly.

    Prompts come in any length up to ``settings.n_positions``, batches always ``settings.batch`` wide.
    """

    clock: Clock

    def prepare(self, folder: Path) -> Prepared:
        """Everything that is not loading: import libraries, set threads, read the artifact's configuration."""

    def load(self) -> None:
        """Bring the weights into memory, ready to run; timed once."""

    def prefill(self, inputs: np.ndarray) -> None:
        """Run a prompt [batch, tokens] (or pixels) from an empty cache and pick the first new token."""

    def decode(self, tokens_B1: np.ndarray | None = None) -> None:
        """Run one token per sequence with the cache, and pick the next; None takes what was picked last."""

    def logits(self) -> np.ndarray:
        """What the last ``prefill`` or ``decode`` answered, as float32.

        A decoder's logits at the last position [batch, vocabulary], an encoder's last hidden states [batch, tokens,
        width], a classifier's or a vision model's logits [batch, classes]. Costs nothing unless it is called.
        """

    def close(self) -> None:
        """Let go of the model and of every global setting that was changed."""

    def facts(self) -> Facts:
        """What was run and how; called after the measurement and before ``close``."""
