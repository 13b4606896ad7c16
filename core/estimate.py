"""What a call is expected to take, told before it runs: seconds and bytes from a method's cost and a model's pace.

Knows no torch: the dashboard asks it too.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.models.anatomy import Anatomy
from core.models.pace import Pace
from core.registry import Method, Settings
from core.types import Cost


@dataclass(frozen=True)
class Estimate:
    """One call's expected cost on this machine."""

    seconds: float
    extra_bytes: int
    """Peak memory beside the model."""
    forwards: float
    """Forward passes over the prompt; a backward pass counts as two."""
    n_tokens: int


def estimate(method: Method, anatomy: Anatomy, pace: Pace, n_tokens: int, settings: Settings) -> Estimate:
    """The method's cost for a prompt of so many tokens, in seconds of this model's forward passes.

    A method without a cost takes about one forward pass. Raises what the method's cost raises for settings that do
    not fit the model (``BadInput``).
    """
    cost = method.cost(anatomy, n_tokens, settings) if method.cost else Cost(1)
    return Estimate(cost.forwards * pace.seconds(n_tokens), cost.extra_bytes, cost.forwards, n_tokens)
