"""Every measured phase under the roofs of the machine: how much it had to do, and which share of the best it reached.

A step has to read its weights and its cache once and to do its multiplications: no runtime can be faster than the
slower of the two at the machine's own pace (Williams, Waterman & Patterson, CACM 52(4), 2009). ``roofline`` gives one
row per phase of a run:

- variant, run, runtime, phase, seconds (median)
- flops, weight_bytes, kv_bytes, bytes: of one step; intensity: FLOP per byte
- attained_flops_per_s, attained_bytes_per_s; roof_flops_per_s: the least of matrix rate and intensity × bandwidth
- share_of_roof, share_of_bandwidth, share_of_matrix_rate: 0–1, above 1 where something is counted or measured wrongly
- bound: ``memory`` or ``compute``; counted: ``exact`` or ``by share of parameters`` (weight_bytes)

``roof_line`` gives the line itself: intensity, flops_per_s, bound.
"""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = (
    *(
        "variant",
        "run",
        "runtime",
        "phase",
        "seconds",
        "flops",
        "weight_bytes",
        "kv_bytes",
        "bytes",
        "intensity",
    ),
    *("attained_flops_per_s", "attained_bytes_per_s", "roof_flops_per_s"),
    *("share_of_roof", "share_of_bandwidth", "share_of_matrix_rate", "bound", "counted"),
)


@dataclass(frozen=True)
class Work:
    """What one step of a phase has to do."""

    flops: float
    weight_bytes: float
    kv_bytes: float

    @property
    def bytes(self) -> float:
        """Everything that must be read."""
        return self.weight_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes
