"""How speed is measured: every number of the procedure in one frozen, hashed record.

Two measurements may be compared only if their protocols have the same hash. A tier is how long one is willing
to wait; it changes how much is measured, never what. Change a field or the loop that reads it and raise
``VERSION``: old runs keep their old hash and stay comparable among themselves.

The workload is fixed: the same seeded token ids for every model with the same vocabulary, greedy choice, the
end-of-text token ignored, so that every model does the same amount of work. One prefill is one forward over the
whole prompt from an empty cache, logits of the last position only, and the pick of the first token. One decode
step is one forward of one token per sequence with the cache, and the pick of the next. Decode steps follow a prompt of
``depth`` tokens where that is asked for (version 2).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from core.profile.steady import SteadyRule
from core.types import content_hash

Tier = Literal["rapid", "quick", "full"]

NAME = "fixed-ids"
VERSION = 2


@dataclass(frozen=True)
class Effort:
    """How much a tier measures; times in seconds, counts and times per phase."""

    warmup: SteadyRule
    warmup_cap_s: float
    min_samples: int
    min_seconds: float
    max_half_width: float | None
    """Stop only when the median's interval is this narrow (a share of the median); None does not ask."""
    phase_cap_s: float
    """A phase ends here whatever it has; the run then says that it was the cap that ended it."""
    quiet_wait_s: float
    """How long to wait, before the start, for other processes to become quiet."""


EFFORTS: dict[Tier, Effort] = {
    "rapid": Effort(SteadyRule(window=3, tolerance=0.05), 5, 12, 1, None, 7, 5),
    "quick": Effort(SteadyRule(window=5, tolerance=0.03), 12, 30, 8, None, 25, 15),
    "full": Effort(SteadyRule(window=10, tolerance=0.02), 30, 100, 30, 0.02, 180, 60),
}


@dataclass(frozen=True)
class Protocol:
    """A complete description of a measurement; what is measured, how long, and what counts as disturbed."""

    tier: Tier
    effort: Effort
    prompt_tokens: int
    new_tokens: int
    batch: int
    seed: int
    depth: int = 0
    """Tokens in the cache at the first decode step; 0 is the prompt's."""
    parity: bool = True
    """Whether the measured process's answers are held against the artifact's own before its speed is told."""
    contended_share: float = 0.10
    """Other processes' share of the CPUs, above which a sample counts as contended."""
    contention_span_s: float = 0.1
    """Shortest stretch over which that share is read: the kernel counts in ticks of 10 ms."""
    smallest_clean: int = 6
    """Clean samples needed to leave contended ones out: the fewest that give a median a 95 % interval."""
    frequency_drop: float = 0.10
    """Fall of the processor's clock within a phase that is flagged."""
    name: str = NAME
    version: int = VERSION

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of every field."""
        return content_hash(asdict(self))

    def __str__(self) -> str:
        return f"{self.name}/{self.version} {self.tier} {self.hash[:12]}"

    @property
    def longest_s(self) -> float:
        """Most seconds that waiting, warming up and measuring two phases can take; loading comes on top."""
        return self.effort.quiet_wait_s + 2 * (self.effort.warmup_cap_s + self.effort.phase_cap_s)


@dataclass(frozen=True)
class Blocks:
    """How two are measured in turn: how many blocks of four stretches, and how long a stretch is."""

    n: int
    """Fixed beforehand: whoever looks at the verdict and goes on until it pleases finds a difference between twins."""
    stretch_s: float


BLOCKS: dict[Tier, Blocks] = {"rapid": Blocks(12, 0.25), "quick": Blocks(20, 0.5), "full": Blocks(40, 1.0)}


@dataclass(frozen=True)
class PairedProtocol:
    """A complete description of a comparison of two in one session."""

    workload: Protocol
    phase: str
    blocks: Blocks
    delta: float
    """Smallest difference that matters, as a share."""
    settle_s: float = 0.25
    """Pause between two stretches: a maths library's threads spin for up to 0.2 s after their last work."""
    fewest_steps: int = 5
    """Timed in a stretch however long they take."""
    name: str = "paired-blocks"
    version: int = 1

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of every field."""
        return content_hash(asdict(self))

    def __str__(self) -> str:
        return f"{self.name}/{self.version} {self.workload.tier} {self.hash[:12]}"
