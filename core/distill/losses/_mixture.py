"""The log of a mixture of two distributions, in logs throughout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share · a + (1 − share) · b), exact at both ends."""
    if share == 0.0:
        return log_b
    if share == 1.0:
        return log_a
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
