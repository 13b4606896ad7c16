"""What every runtime has in common: its settings, and the five verbs the measuring loop calls.

A runtime is one file beside this one. It says how to get a model ready, load it, run a prompt, run one more
token and let go. It knows nothing of warm-up, samples or statistics; the loop (``_measure.py``) knows nothing of
torch. A new runtime is a class with these verbs, a ``create(settings)`` that makes one, and a ``run`` registered
with ``@method("profile")`` that calls ``profile_artifact``.
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
    def suffix(self) -> str:
        """What the numbers' names end in where they are of something else than the model as it is; mostly nothing."""
        return ""

    def protocol(self) -> protocol.Protocol:
        """The protocol that these settings ask for."""
        return protocol.Protocol(
            tier=self.tier,
            effort=protocol.EFFORTS[self.tier],
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            batch=self.batch,
            seed=self.seed,
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
    """Something that runs a model. The verbs are called in this order, ``prefill`` and ``decode`` repeatedly."""

    clock: Clock

    def prepare(self, folder: Path) -> Prepared:
        """Everything that is not loading: import libraries, set threads, read the configuration, convert."""

    def load(self) -> None:
        """Bring the weights into memory, ready to run; timed once."""

    def prefill(self, inputs: np.ndarray) -> None:
        """Run a prompt [batch, prompt_tokens] (or pixels) from an empty cache and pick the first new token."""

    def decode(self) -> None:
        """Run the token picked last, one per sequence, with the cache, and pick the next."""

    def close(self) -> None:
        """Let go of the model and of every global setting that was changed."""

    def facts(self) -> Facts:
        """What was run and how; called after the measurement and before ``close``."""
