"""Which share of its peaks a kind of engine reaches, learned from published rates.

A class is what computes and what it reads from: processors of boards, of phones; Hexagon NPUs of phones and of laptops;
Apple's GPUs; others with shared memory; Jetsons; CUDA with GDDR and with HBM. A decode step takes t = bytes/(η·W) + L·c:
η is the share of the bandwidth W, c what calls cost per layer. c is asked for only of GPUs and NPUs, where a call is a
launch, only where at least ``ENOUGH`` rows tell it from η, and only up to ``LONGEST``. For a prompt, η_c is the share
of the dense fp16 peak (fp32 where that is what is known).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from core.devices.registry import Device, EngineClass
from core.predict.published import Row, rows
from core.predict.rate import Pace, prefill_flops

ENOUGH = 8
"""Rows from which a second number is asked for beside η."""
LONGEST = 200e-6
"""Seconds per layer: ten kernels of 20 µs. What is beyond is not launching."""
STEP = 5e-6
CALLED: frozenset[EngineClass] = frozenset(
    {"apple_gpu", "unified_gpu", "jetson_gpu", "cuda_gddr", "cuda_hbm", "phone_npu", "laptop_npu"}
)
"""Where a layer's kernels are launched one by one."""
STATIC: frozenset[EngineClass] = frozenset({"phone_npu", "laptop_npu"})
"""Where a graph of fixed shapes reads the whole cache at every step, however full it is."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peaks that are reached, and what they rest on."""

    share: float
    """Of the bandwidth (η)."""
    layer_s: float
    """Per layer (c)."""
    compute_share: float | None
    """Of the dense peak, in a prompt (η_c); None where no row tells."""
    n_rows: int
    n_devices: int
    least_bytes: float
    """Read per step by the smallest model behind it: for much smaller ones nothing tells what calls cost."""

    def pace(self, device: Device, *, assumed: float | None = None) -> Pace | None:
        """What a device reaches with it; None for one whose bandwidth is not known.

        ``assumed`` is the share of the dense peak where no row tells it.
        """
        if device.bandwidth is None:
            return None
        top, share = peak(device), assumed if self.compute_share is None else self.compute_share
        flops = None if top is None or share is None else share * top
        return Pace(self.share * device.bandwidth, flops, self.layer_s)


def peak(device: Device) -> float | None:
    """FLOP per second that prompts are held against: dense fp16, or fp32 where nothing else is told."""
    return device.fp16 or device.fp32


@cache
def efficiencies() -> dict[EngineClass, Efficiency]:
    """Every class that has a row, from all rows."""
    known = rows()
    return {
        engine: fit([row for row in known if row.engine == engine], engine)
        for engine in sorted({row.engine for row in known})
    }


def fit(known: Sequence[Row], engine: EngineClass | None) -> Efficiency:
    """The numbers that explain rows best: least sum of |ln(predicted / measured)|; ``engine`` None: of mixed classes."""
    seconds = np.array([1 / row.decode for row in known])
    best_possible = np.array([row.read_bytes / row.bandwidth for row in known])
    layers = np.array([len(row.shape.layers) for row in known])
    asked = engine in CALLED and len(known) >= ENOUGH
    most = min(LONGEST, float((seconds / layers).min()) / 2) if asked else 0.0
    found = []
    for layer_s in np.arange(0.0, most + STEP / 2, STEP):
        share = min(1.0, float(np.median(best_possible / (seconds - layers * layer_s))))
        off = np.abs(np.log((best_possible / share + layers * layer_s) / seconds)).sum()
        found.append((float(off), share, float(layer_s)))
    _, share, layer_s = min(found)
    computed = [value for row in known if row.engine == engine and (value := compute_share(row)) is not None]
    return Efficiency(
        share,
        layer_s,
        float(np.median(computed)) if computed else None,
        len(known),
        len({row.device.slug for row in known}),
        min(row.read_bytes for row in known),
    )


def compute_share(row: Row) -> float | None:
    """The share of the dense peak that a row's prompt reached; None for a row without, or a peak that is not told."""
    top = peak(row.device)
    if row.prefill is None or top is None or row.engine in STATIC:
        return None
    return prefill_flops(row.shape, row.prompt) * row.prefill / row.prompt / top
