"""How many independent pieces of work fit in memory at once, and what happens when a guess was too high.

Shared by the probes that run many small variations of one forward pass. It knows bytes and devices, nothing of
models: the caller says what one piece takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from core.errors import ran_out_of_memory
from core.free_memory import free_memory
from core.lazy import torch

T = TypeVar("T")
SHARE_OF_FREE = 0.5
"""Of the memory that is free now; the other half is for what an estimate forgets."""


def in_batches(
    n: int,
    run: Callable[[int, int], T],
    *,
    bytes_each: float | Sequence[float],
    device: str,
    at_most_bytes: float | None = None,
) -> list[T]:
    """Call ``run(start, stop)`` over 0 … n in order, in batches as large as memory allows; returns what it returned.

    ``bytes_each`` is the peak memory of one piece, or of each. When an allocator refuses, the batch is halved and
    the same pieces are run again, so ``run`` must be able to start over; a single piece that does not fit raises the
    allocator's own error. ``at_most_bytes`` bounds a batch where not memory but processor caches are the limit.
    """
    sizes = list(bytes_each) if isinstance(bytes_each, Sequence) else [bytes_each] * n
    budget = SHARE_OF_FREE * free_bytes(device)
    if at_most_bytes is not None:
        budget = min(budget, at_most_bytes)
    most = n
    found: list[T] = []
    start = 0
    while start < n:
        stop = min(_reach(sizes, start, budget), start + most)
        refused = False
        try:
            found.append(run(start, stop))
        except (RuntimeError, MemoryError) as error:
            if stop - start == 1 or not ran_out_of_memory(error):
                raise
            refused = True
        if not refused:
            start = stop
            continue
        most = (stop - start) // 2
        if device.startswith(
            "cuda"
        ):  # outside the handler, whose traceback kept the failed batch's tensors alive
            torch.cuda.empty_cache()
    return found


def free_bytes(device: str) -> int:
    """Memory that a new tensor could take on this device; on CUDA with what torch's cache holds unused."""
    if not device.startswith("cuda"):
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _reach(sizes: Sequence[float], start: int, budget: float) -> int:
    """One past the last piece of the batch that begins at ``start``: at least one piece."""
    total = 0.0
    for stop in range(start, len(sizes)):
        total += sizes[stop]
        if total > budget:
            return max(start + 1, stop)
    return len(sizes)
