"""The learning rate over a training, by the share of its tokens that were read. Knows no optimizer.

Counting tokens instead of updates makes the schedule the same however the tokens are cut into updates.
"""

from __future__ import annotations

import math

from core.distill.settings import TrainingSettings

FLOOR = 0.1
"""What cosine falls to, as a share of the highest rate (Hoffmann et al., arXiv 2203.15556, appendix B)."""
DECAY = 0.2
"""Last share of the tokens over which wsd falls to 0 (MiniCPM, arXiv 2404.06395, uses about a tenth)."""


def learning_rate(share: float, settings: TrainingSettings) -> float:
    """The rate when ``share`` (0–1) of all tokens is read: linear warmup, then as ``settings.schedule`` says."""
    return settings.learning_rate * _factor(share, settings)


def _factor(share: float, settings: TrainingSettings) -> float:
    if share < settings.warmup:
        return share / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "wsd":
        return min(1.0, max(0.0, (1 - share) / DECAY))
    behind = (share - settings.warmup) / (1 - settings.warmup)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(behind, 1.0))) / 2
