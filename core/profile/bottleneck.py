"""What holds a phase back (weights, KV cache, arithmetic, or calls), by how much, and what to try next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Cause = Literal["weights", "kv", "compute", "overhead"]


@dataclass(frozen=True)
class Verdict:
    """Why a phase takes as long as it does."""

    phase: str
    cause: Cause
    seconds: float
    weights_s: float
    """What reading the weights once takes at this machine's measured bandwidth."""
    kv_s: float
    compute_s: float
    """What the multiplications take at the measured matrix rate; runs beside the reading, so only the larger counts."""
    rest_s: float
    """Measured less the larger of the two: calls between kernels, and kernels slower than the roofs."""
    sentence: str
    action: str
    """The next best thing to try, and what it could bring at most."""
