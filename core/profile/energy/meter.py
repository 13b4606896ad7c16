"""Joules of a stretch of work, labelled by where they come from: measured, modelled, or unavailable with the reason.

A counter is read at both ends of the stretch. A meter that only tells watts is sampled once a second and integrated;
that is measured too, and coarser. A model (watts that somebody states × seconds) is never made without being asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Status = Literal["measured", "modelled", "unavailable"]


class EnergyCounter(Protocol):
    """Something that counts joules."""

    name: str
    """``rapl``, ``nvml``, ``jetson``, ``pi``."""
    covers: str
    """Which parts of the machine it counts, in words."""

    def joules(self) -> float:
        """Joules since some moment; never falls."""


@dataclass(frozen=True)
class Energy:
    """Joules of a stretch of work."""

    status: Status
    source: str
    """Name of the counter; empty where there is none."""
    reason: str
    """What is covered, how it was modelled, or why there is nothing."""
    seconds: float = 0.0
    gross_j: float | None = None
    idle_w: float | None = None
    """Watts of the machine before the model was loaded; None where that was not measured."""

    @property
    def net_j(self) -> float | None:
        """Gross less what an idle machine would have taken in that time; never below 0."""
        if self.gross_j is None or self.idle_w is None:
            return None
        return max(0.0, self.gross_j - self.idle_w * self.seconds)
