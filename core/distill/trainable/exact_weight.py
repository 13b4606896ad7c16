"""What is behind a rounded weight: every value of it learned, or its beginning and a low-rank update.

A low-rank update is counted in steps of the grid,

    V = V₀ + step · (alpha / r) · B A,

so that one learning rate moves as many codes of every matrix, whatever its values and its bits. V₀ is the stored weight,
the middle of each of its codes: an update below half a step changes nothing yet, but its gradient is not 0, and it adds
up.

Legend: ``R`` rows, ``C`` columns, ``K`` rank; an axis of experts may lead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from core.distill.trainable.following import add_gradient
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Parameter


class ExactWeight(Protocol):
    """A weight before it is rounded, as it follows from what is learned."""

    @property
    def learned(self) -> Mapping[str, Parameter]:
        """What is learned, by a name; float32."""

    def value(self) -> Tensor:
        """The weight as it is now, float32."""

    def pull(self, gradient: Tensor) -> None:
        """Add to the gradients of what is learned, from that of the weight."""


class Whole:
    """Every value is learned."""

    def __init__(self, start: Tensor) -> None:
        self.learned = {"exact": torch.nn.Parameter(start)}

    def value(self) -> Tensor:
        """See ``ExactWeight``."""
        return self.learned["exact"].detach()

    def pull(self, gradient: Tensor) -> None:
        """See ``ExactWeight``."""
        add_gradient(self.learned["exact"], gradient)


class LowRankUpdate:
    """A beginning that stays, and the product of two thin matrices: A drawn with variance 1 / r, B 0 at first."""

    def __init__(
        self, start_RC: Tensor, step_RC: Tensor, *, rank: int, alpha: float, drawn: Generator
    ) -> None:
        *experts, rows, columns = start_RC.shape
        a_KC = torch.randn(*experts, rank, columns, generator=drawn).to(start_RC.device) / rank**0.5
        b_RK = torch.zeros(*experts, rows, rank, device=start_RC.device)
        self.start_RC, self.unit_RC = start_RC, step_RC * (alpha / rank)
        self.learned = {"lora_A": torch.nn.Parameter(a_KC), "lora_B": torch.nn.Parameter(b_RK)}

    def value(self) -> Tensor:
        """See ``ExactWeight``."""
        a_KC, b_RK = self.learned["lora_A"].detach(), self.learned["lora_B"].detach()
        return self.start_RC + self.unit_RC * (b_RK @ a_KC)

    def pull(self, gradient: Tensor) -> None:
        """See ``ExactWeight``."""
        a_KC, b_RK = self.learned["lora_A"].detach(), self.learned["lora_B"].detach()
        inner_RC = gradient * self.unit_RC
        add_gradient(self.learned["lora_A"], b_RK.mT @ inner_RC)
        add_gradient(self.learned["lora_B"], inner_RC @ a_KC.mT)
