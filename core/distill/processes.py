"""The processes of one training: one, or as many as ``accelerate launch`` started, on this machine or several.

Each has the whole model and takes its share of an update's micro-batches; gradients are added up in float32, once per
update, after the last of them. So it does not matter which parameters a loss reaches, nor by which way through the
model, and one process gives what several give up to the order of a float32 sum. Knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Processes:
    """Which of them this is, and sums over all."""

    def __init__(self) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=not torch.cuda.is_available(), **_patience())
        self.rank: int = self._state.process_index
        self.n: int = self._state.num_processes

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    @property
    def device(self) -> Any:
        """Where this process computes: its own GPU where there is one."""
        return self._state.device

    def mine(self, all_: Sequence[Any]) -> list[tuple[int, Any]]:
        """This process's share of some work, every n-th piece, each with its number."""
        return [(number, piece) for number, piece in enumerate(all_) if number % self.n == self.rank]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.n > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
        if self.n > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, src=0)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The block in the first process, then in all others, which find what it left on disk."""
        with self._state.main_process_first():
            yield

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each number's sum over all processes."""
        if self.n == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.add_up([total])
        return [float(value) for value in total]

    def share(self, value: Any) -> Any:
        """The first process's value, in all of them; plain data and tensors."""
        if self.n == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0)
        return held[0]

    def wait(self) -> None:
        """Until all have come here."""
        self._state.wait_for_everyone()


def _patience() -> dict[str, Any]:
    """Others may wait for hours while the first reads a corpus with the teacher; a process that dies ends them all."""
    return {"timeout": timedelta(days=7)} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
