"""What a training tells while it runs: how far, how good, how fast; and whether somebody wants it to stop."""

from __future__ import annotations

from core.distill.processes import Processes
from core.errors import Cancelled
from core.types import Progress

PACE = 10
"""Updates over which tokens per second are averaged."""


class Telling:
    """The first process reports; among several, a wish to stop waits until the update's end, where all can hear it."""

    def __init__(self, progress: Progress, processes: Processes, total: int) -> None:
        self._progress, self._processes, self._total = progress, processes, total
        self._updates: list[tuple[float, int]] = []
        self._latest = ""
        self.wish: Cancelled | None = None

    def __call__(self, tokens: int, doing: str) -> None:
        """Report; raises ``Cancelled`` where this is the only process and it is to stop."""
        if not self._processes.first:
            return
        try:
            self._progress(min(tokens, self._total), self._total, f"{doing}{self._latest}")
        except Cancelled as wish:
            if self._processes.n == 1:
                raise
            self.wish = wish

    def updated(self, loss: float, *, seconds: float, tokens: int) -> float:
        """Take note of an update; tokens per second over the latest ones."""
        self._updates = [*self._updates, (seconds, tokens)][-PACE:]
        pace = sum(n for _, n in self._updates) / max(1e-9, sum(s for s, _ in self._updates))
        self._latest = f": loss {loss:.4f}, {pace:,.0f} tokens/s"
        return pace

    def stop_if_wanted(self, wanted: float) -> None:
        """Stop in all processes where ``wanted``, the number of those that were asked to, is not 0."""
        if wanted:
            raise self.wish or Cancelled("stopped with the first process")
