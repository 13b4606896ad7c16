"""What a model's weights would weigh in a zip file: the only place where zeros anywhere save anything today.

Deflate of blocks of the tensors as they are in memory; of a large model a sample, with its interval.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from core.lazy import torch
from core.types import Metric

BLOCK_BYTES = 1 << 18
"""Deflate looks back 32 KiB, so blocks lose almost nothing against one long stream."""
MOST_BLOCKS = 128
LEVEL = 6


def zipped_bytes(model: Any, name: str) -> Metric:
    """Bytes of all parameters (tied ones once) after deflate, as a metric called ``name``; ``n`` blocks were looked at."""
    tensors = [parameter.data for parameter in model.parameters()]
    places = [(i, b) for i, tensor in enumerate(tensors) for b in range(-(-tensor.nbytes // BLOCK_BYTES))]
    total = sum(tensor.nbytes for tensor in tensors)
    chosen = places
    if len(places) > MOST_BLOCKS:
        chosen = [places[int(index)] for index in np.linspace(0, len(places) - 1, MOST_BLOCKS)]
    sizes = np.array([_deflated(tensors[i], b) for i, b in chosen], dtype=float)
    if chosen is places:
        return Metric(name, float(sizes[:, 1].sum()), "B", "lower", n=len(sizes))
    ratios = sizes[:, 1] / sizes[:, 0]
    mean, half = float(ratios.mean()), 1.96 * float(ratios.std(ddof=1)) / len(ratios) ** 0.5
    return Metric(
        name, total * mean, "B", "lower", n=len(sizes), low=total * (mean - half), high=total * (mean + half),
        interval=f"normal, over {len(sizes)} blocks of {BLOCK_BYTES >> 10} KiB spread over the weights",
    )  # fmt: skip


def _deflated(tensor: Any, block: int) -> tuple[int, int]:
    """Bytes of one block before and after."""
    each = BLOCK_BYTES // tensor.element_size()
    flat = tensor.reshape(-1)[block * each : (block + 1) * each]
    raw = flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return len(raw), len(zlib.compress(raw, LEVEL))
