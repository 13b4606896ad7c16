"""The document bootstrap as a loop over draws, for comparison with the vectorised one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence


def resampled(
    documents: Sequence[object], statistic: Callable[[list[object]], float], *, draws: int, seed: int
) -> list[float]:
    """``statistic`` of ``draws`` samples of documents, each drawn with replacement and as large as the original."""
    generator = random.Random(seed)
    return [statistic(generator.choices(documents, k=len(documents))) for _ in range(draws)]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = sum(values) / len(values)
    return mean, (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
