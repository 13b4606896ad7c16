"""AWQ's search as it is written down: every candidate multiplied out on every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def best_ratio(
    weights: Sequence[Tensor], x_TI: Tensor, rounding: Callable[[Tensor], Tensor], steps: int
) -> tuple[float, float, float]:
    """The ratio with the smallest change of the outputs, that change, and round-to-nearest's."""
    size_I = x_TI.abs().mean(0)

    def loss(scale_I: Tensor) -> float:
        total = 0.0
        for weight_OI in weights:
            wrong = (x_TI / scale_I) @ rounding(weight_OI * scale_I).T - x_TI @ weight_OI.T
            total += float(wrong.double().pow(2).sum())
        return total

    losses = []
    for step in range(steps + 1):
        scale_I = size_I ** (step / steps)
        losses.append(loss(scale_I / torch.sqrt(scale_I.max() * scale_I.min())))
    best = min(range(steps + 1), key=lambda step: losses[step])
    return best / steps, losses[best], losses[0]


def smoothing_scales(x_TI: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """SmoothQuant's s_j, one channel at a time."""
    scales = []
    for j in range(x_TI.shape[1]):
        largest_x = max(abs(float(value)) for value in x_TI[:, j])
        largest_w = max(abs(float(value)) for weight_OI in weights for value in weight_OI[:, j])
        scales.append(largest_x**alpha / largest_w ** (1 - alpha))
    return torch.tensor(scales)
