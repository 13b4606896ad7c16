"""The roofs of this machine: how fast it reads memory, multiplies matrices, and calls a layer that does nothing.

Every other speed is a share of these. They are measured in a fresh process and kept per environment hash, so they are
taken once per machine and software. ``Roofs.frame`` has one row per roof:

- quantity: ``read_bandwidth`` and ``copy_bandwidth`` (bytes/s; a copy counts what it reads and what it writes),
  ``matrix_rate`` (FLOP/s, a multiply-add is two), ``layer_overhead`` and ``step_overhead`` (s)
- dtype: of a matrix rate, else empty; size: elements of the buffer, or n of an n × n × n product; threads
- value, low, high: median and its 95 % order-statistics interval (NaN where there is none); n; kernel: what ran

``machine_roofs(device, progress, again=False)`` measures them or gives what is kept; ``known_roofs(device)`` only reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

COLUMNS = ("quantity", "dtype", "size", "threads", "value", "low", "high", "n", "unit", "kernel")


@dataclass(frozen=True)
class Roofs:
    """What this machine can do at best, as measured."""

    device: str
    environment: str
    """Hash of the environment they were taken in."""
    taken_at: str
    """ISO 8601, UTC."""
    other_cpu: float
    """Largest share of the processors that other programs took meanwhile, 0 to 1."""
    flags: tuple[str, ...]
    frame: pd.DataFrame
    """One row per roof; see the module."""

    def read_bytes_per_s(self, threads: int | None = None) -> float:
        """The highest read bandwidth, of so many threads or of any number."""
        return self._best("read_bandwidth", threads=threads)

    def flops_per_s(self, dtype: str) -> float:
        """The highest matrix rate of a dtype; of float32 where that dtype was not measured."""
        known = set(self.frame.loc[self.frame["quantity"] == "matrix_rate", "dtype"])
        return self._best("matrix_rate", dtype=dtype if dtype in known else "float32")

    @property
    def layer_overhead_s(self) -> float:
        """Seconds that one layer of an eager torch decoder takes to compute nothing: Python and its operator calls."""
        return self._best("layer_overhead")

    @property
    def step_overhead_s(self) -> float:
        """Seconds of a decode step beside its layers, with nothing to compute."""
        return self._best("step_overhead")

    def _best(self, quantity: str, *, threads: int | None = None, dtype: str = "") -> float:
        rows = self.frame[(self.frame["quantity"] == quantity) & (self.frame["dtype"] == dtype)]
        rows = rows if threads is None else rows[rows["threads"] == threads]
        return float(rows["value"].max())
