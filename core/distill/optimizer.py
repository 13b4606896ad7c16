"""AdamW on the float32 values of a training: gradients summed over an update, clipped, applied. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from core.distill.precision import Weights
from core.distill.settings import TrainingSettings
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Optimizer:
    """AdamW whose state is plain tensors by parameter name, so that a checkpoint needs no pickle."""

    def __init__(self, weights: Weights, settings: TrainingSettings) -> None:
        self._weights = weights
        self._clip = settings.clip or float("inf")
        decayed = [value for value in weights.exact.values() if value.ndim >= 2]
        plain = [value for value in weights.exact.values() if value.ndim < 2]
        self._adam = torch.optim.AdamW(
            [
                {"params": group, "weight_decay": decay}
                for group, decay in ((decayed, settings.weight_decay), (plain, 0.0))
                if group
            ],
            lr=settings.learning_rate,
            betas=BETAS,
            fused=True,
        )

    def gradients(self) -> list[Tensor]:
        """The gradient of every value, in order; zeros where nothing reached one."""
        for value in self._weights.exact.values():
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        return [value.grad for value in self._weights.exact.values() if value.grad is not None]

    def step(self, rate: float, *, n: int) -> float:
        """Move by the gradient of the mean over ``n`` targets, clipped; its norm before clipping.

        Where the norm is not finite nothing moves, and the caller says what is to be done.
        """
        gradients = self.gradients()
        torch._foreach_mul_(gradients, 1 / n)
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(norm))
        if finite:
            torch.nn.utils.clip_grads_with_norm_(list(self._weights.exact.values()), self._clip, norm)
            for group in self._adam.param_groups:
                group["lr"] = rate
            self._adam.step()
            self._weights.follow()
        self.forget()
        return float(norm)

    def forget(self) -> None:
        """Drop the gradients that were collected."""
        for name, value in self._weights.exact.items():
            value.grad = self._weights.parameters[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """Every moment and step count, as ``name/moment``; empty before the first step."""
        return {
            f"{name}/{moment}": self._adam.state[value][moment]
            for name, value in self._weights.exact.items()
            for moment in MOMENTS
            if value in self._adam.state
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave."""
        for name, value in self._weights.exact.items():
            if f"{name}/step" in state:
                self._adam.state[value] = {
                    moment: state[f"{name}/{moment}"].to(value.device, copy=True) for moment in MOMENTS
                }
