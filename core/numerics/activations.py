"""Rounding a linear layer's input to 8-bit integers before it is multiplied: what W8A8 adds to int8 weights.

The arithmetic is that of compressed-tensors' quantized forward (``compute_dynamic_scales_and_zp``,
``_quantize_dequantize``), so that a model that rounds here and one that plain transformers reloads give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ActivationScheme:
    """Symmetric 8-bit codes for what a linear layer reads."""

    scale: float | None = None
    """static: one scale for every input, s = max|X| / 127.5 over calibration text; None, dynamic: one per token,
    computed as it passes."""
    bits: int = 8

    @property
    def label(self) -> str:
        """A short name, e.g. ``a8 dynamic``."""
        return f"a{self.bits} {'dynamic' if self.scale is None else 'static'}"


def round_input(input_: Tensor, scheme: ActivationScheme) -> Tensor:
    """The input [batch, position, C] as codes times scale: x̂ = clamp(round(x / s), -128, 127) · s, in its own dtype.

    An input of two axes gets one dynamic scale for all of it: compressed-tensors tells tokens by the first two axes.
    """
    high = (1 << (scheme.bits - 1)) - 1
    if scheme.scale is not None:
        scale = torch.tensor([scheme.scale], dtype=input_.dtype, device=input_.device)
    else:
        inner = tuple(range(2, input_.ndim)) or tuple(range(input_.ndim))
        # bits 8: 127.5, half the range of codes, as for weights.
        scale = input_.abs().amax(inner, keepdim=True) / (high + 0.5)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (input_ / scale).clamp_(-high - 1, high).round_() * scale
