"""What the measuring process tells the one that asked: raw samples and facts, as JSON and nothing else.

No statistics here: they are made from these by ``summary.py``, and can be made again when it learns more.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from core.types import Family

Phase = Literal["load", "first_forward", "prefill", "forward", "decode"]
"""``prefill`` and ``decode`` for decoders, ``forward`` for encoders and vision models."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sample(_Record):
    """One timed iteration, kept whatever it looks like."""

    phase: Phase
    iteration: int
    """Counts from 0 within the phase, warm-up included."""
    value_ms: float
    warmup: bool
    contended: bool
    other_cpu: float
    """Other programs' share of the usable processors around this sample, 0 to 1."""
    clock_mhz: float | None


class Stretch(_Record):
    """Steps timed in one go while the other side of a comparison waited."""

    values_ms: tuple[float, ...]
    other_cpu: float
    """Other programs' share of the usable processors meanwhile, 0 to 1."""


class PhaseEnd(_Record):
    """How a phase went."""

    steady: bool
    ended_by: Literal["enough", "time cap"]


class Facts(_Record):
    """What a runtime knows of itself once it has run."""

    dtype: str
    attention_kernel: str
    weights_memory_bytes: int
    """Bytes of parameters and buffers as they lie in memory, tied ones once."""
    device_peak_bytes: int | None
    """Peak of a GPU's allocator; None on the CPU, whose peak is the process's."""
    conditions: dict[str, Any]
    notes: tuple[str, ...]
    exact: bool | None = None
    """Whether its answers must be the artifact's own but for rounding; None: if it computes in float32 and its numbers
    bear no mark of another form."""
    kv_cache_bytes: int | None = None
    """Of what the last sequence left in the cache; None for a model that keeps none, or where it cannot be seen."""


class Memory(_Record):
    """Resident memory of the measuring process, bytes."""

    baseline_bytes: int
    """Before loading: what Python and the runtime's libraries take."""
    peak_bytes: int
    """Highest from start to end, loading included."""
    inference_peak_bytes: int | None
    """Highest after loading and the first forward; None where the system cannot reset its mark."""


class Parity(_Record):
    """The measured process's answers against the artifact's own, float32."""

    texts: int
    positions: int
    kl: tuple[float, ...]
    """Nats per position, a mean per text; empty where answers are hidden states."""
    top1: tuple[float, ...]
    """Share of positions with the same likeliest answer, per text."""
    kl_base: tuple[float, ...]
    """The same KL from the base's own answers; empty where no base was named."""
    cosine: float | None
    """Of hidden states; None where answers are logits."""
    max_abs: float
    span: float
    """Largest less smallest of the artifact's answers."""
    rounds_inputs: bool
    seconds: float


class Measured(_Record):
    """Everything one measuring process has to say."""

    family: Family
    samples: tuple[Sample, ...]
    phases: dict[Phase, PhaseEnd]
    memory: Memory
    facts: Facts
    environment: dict[str, Any]
    files: str
    """SHA-256 over the artifact's configuration and weight files."""
    other_cpu_at_start: float
    """Others' share when the wait for a quiet moment ended."""
    load_average: float
    seconds: float
    parity: Parity | None = None
    """None where it was not asked for."""
