"""Every measured phase under the roofs of the machine: how much it had to do, and which share of the best it reached.

A step has to read its weights and its cache once and to do its multiplications: no runtime can be faster than the
slower of the two at the machine's own pace (Williams, Waterman & Patterson, CACM 52(4), 2009). ``roofline`` gives one
row per phase of each variant and runtime, by the newest run with those settings on this machine:

- variant, name, run, runtime, settings (what is not default, in words), phase, seconds (median), low, high, flagged
- flops, weight_bytes, kv_bytes, bytes: of one step; intensity: FLOP per byte
- attained_flops_per_s, attained_bytes_per_s; roof_flops_per_s: the least of matrix rate and intensity × bandwidth
- share_of_roof, share_of_bandwidth, share_of_matrix_rate: 0–1; above 1 where the weights lie in a cache faster than the
  memory, or something is counted or measured wrongly; the first is the larger of the other two
- bound: ``memory`` or ``compute``; counted: ``as held`` (what the runtime said it keeps in memory), ``as stored`` (bytes
  of the files) or ``share of parameters`` (files whose names tell less)

``roof_line`` gives the line itself: intensity, flops_per_s, bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from core.errors import CannotOpen
from core.predict.model import Shape
from core.profile.environment import environment
from core.profile.machine import Roofs
from core.profile.work import Phase, Step, work_under
from core.types import Measurement, Progress, Run, Variant, canonical_json, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

COLUMNS = (
    *("variant", "name", "run", "runtime", "settings", "phase", "seconds", "low", "high", "flagged"),
    *("flops", "weight_bytes", "kv_bytes", "bytes", "intensity"),
    *("attained_flops_per_s", "attained_bytes_per_s", "roof_flops_per_s"),
    *("share_of_roof", "share_of_bandwidth", "share_of_matrix_rate", "bound", "counted"),
)
TIMES: Mapping[Phase, str] = {"prefill": "ttft_ms", "decode": "tpot_ms", "forward": "latency_ms"}
"""Phase → what its median time is named, before the runtime's suffix."""
PER_DECADE = 24
"""Points of the roof's line."""
_EFFORT = ("tier", "seed", "parity", "when_busy")
"""Settings that change how a phase is measured, never what."""


def matrix_rate(roofs: Roofs, dtype: str) -> float:
    """The rate that no step in this dtype can pass, FLOP/s.

    float32 is held against float32. Half precision may be widened by a kernel, and packed integers are computed in
    whatever is fastest, so those are held against the highest rate that they could take.
    """
    if dtype == "float32":
        return roofs.flops_per_s("float32")
    if dtype in ("bfloat16", "float16"):
        return max(roofs.flops_per_s(dtype), roofs.flops_per_s("float32"))
    return max(roofs.flops_per_s(name) for name in ("float32", "bfloat16", "int8"))


def placed(step: Step, roofs: Roofs) -> dict[str, Any]:
    """The columns of one step from ``flops`` on, with ``phase`` and ``seconds``."""
    work, bandwidth, rate = step.work, roofs.read_bytes_per_s(), matrix_rate(roofs, step.dtype)
    roof = min(rate, work.intensity * bandwidth)
    attained = work.flops / step.seconds
    return {
        "phase": step.phase,
        "seconds": step.seconds,
        "flops": work.flops,
        "weight_bytes": work.weight_bytes,
        "kv_bytes": work.kv_bytes,
        "bytes": work.bytes,
        "intensity": work.intensity,
        "attained_flops_per_s": attained,
        "attained_bytes_per_s": work.bytes / step.seconds,
        "roof_flops_per_s": roof,
        "share_of_roof": attained / roof,
        "share_of_bandwidth": work.bytes / step.seconds / bandwidth,
        "share_of_matrix_rate": attained / rate,
        "bound": "memory" if work.intensity * bandwidth < rate else "compute",
        "counted": work.counted,
    }


def roof_line(roofs: Roofs, dtype: str) -> pd.DataFrame:
    """The roof of a dtype: intensity (FLOP per byte), flops_per_s, bound; the ridge is one of its points."""
    bandwidth, rate = roofs.read_bytes_per_s(), matrix_rate(roofs, dtype)
    ridge = rate / bandwidth
    decades = np.arange(-3 * PER_DECADE, 2 * PER_DECADE + 1) / PER_DECADE
    intensity = ridge * 10.0**decades
    return pd.DataFrame(
        {
            "intensity": intensity,
            "flops_per_s": np.minimum(rate, intensity * bandwidth),
            "bound": np.where(intensity < ridge, "memory", "compute"),
        }
    )


# --- from a catalog ------------------------------------------------------------------------------------


def roofline(catalog: Catalog, base_id: str, roofs: Roofs, progress: Progress = silent) -> pd.DataFrame:
    """One row per phase of each variant and runtime; see the module. Empty where nothing was measured on this machine.

    Raises ``BadInput`` for an unknown base, ``WorkerDied``, and what ``progress`` raises.
    """
    rows = []
    for variant, run, time, step in measured_steps(catalog, base_id, roofs.device, progress):
        low, high = (None if bound is None else bound / 1e3 for bound in (time.low, time.high))
        head = {
            "variant": variant.id,
            "name": variant.name,
            "run": run.id,
            "runtime": step.runtime,
            "settings": _told(run),
            "low": low,
            "high": high,
            "flagged": bool(run.flags),
        }
        rows.append({**head, **placed(step, roofs)})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"low": float, "high": float})


def measured_steps(
    catalog: Catalog, base_id: str, device: str, progress: Progress = silent
) -> Iterator[tuple[Variant, Run, Measurement, Step]]:
    """Every phase that was measured on this machine, by the newest run of its settings, a valid one before a flagged."""
    from core.entries import folder_of
    from core.profile.shapes import known_shape, shapes_of

    catalog.variant(base_id)  # refuses an unknown one
    host = environment(device)["host"]
    runs = {
        variant: found
        for variant in catalog.variants(base_id)
        if (found := _newest(run for run in catalog.runs(variant.id) if _is_here(run, device, host)))
    }
    folders = {}
    for variant in runs:
        if known_shape(variant.fingerprint) is None:
            try:
                folders[variant.fingerprint] = folder_of(catalog, variant, progress=progress)
            except CannotOpen:
                continue  # gone or changed where the user has it: nothing says what its steps had to read
    shapes = shapes_of(folders, progress)
    for variant, found in runs.items():
        shape = shapes.get(variant.fingerprint) or known_shape(variant.fingerprint)
        if shape is not None:
            for run in found:
                for time, step in steps_of(run, shape):
                    yield variant, run, time, step


def steps_of(run: Run, shape: Shape) -> Iterator[tuple[Measurement, Step]]:
    """The phases of a profile run, with the measured time of each."""
    seen, held = run.conditions, measured(run, "weights_memory_bytes")
    for phase, stem in TIMES.items():
        time = measured(run, stem)
        if time is not None:
            work = work_under(seen, phase, shape, held.value if held else None)
            runtime, dtype = str(seen["method"]), str(seen["dtype"])
            yield time, Step(phase, time.value / 1e3, work, dtype, runtime, len(shape.layers))


def profile_of(
    catalog: Catalog, variant_id: str, device: str, runtime: str, settings: Mapping[str, Any]
) -> Run | None:
    """The newest profile of a variant in a runtime with these settings on this machine, valid ones first; None: none."""
    host = environment(device)["host"]
    wanted = {name: value for name, value in settings.items() if name not in _EFFORT}
    runs = _newest(run for run in catalog.runs(variant_id) if _is_here(run, device, host))
    fits = (run for run in runs if run.conditions["method"] == runtime and _asked(run) == wanted)
    return next(fits, None)


def measured(run: Run, stem: str) -> Measurement | None:
    """The measurement named ``stem`` with any runtime's suffix; None if the run has none."""
    names = (m for m in run.measurements if m.name == stem or m.name.startswith(f"{stem}_"))
    return min(names, key=lambda m: len(m.name), default=None)


def _is_here(run: Run, device: str, host: Mapping[str, Any]) -> bool:
    """Whether a run is a profile of this very machine and device."""
    taken = run.conditions.get("environment", {}).get("host", {})
    return run.kind == "profile" and run.conditions.get("device") == device and _same(taken, host)


def _same(stored: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a record equals what it was written from; a database gives lists back for tuples."""
    return canonical_json(stored) == canonical_json(now)


def _newest(runs: Iterator[Run]) -> list[Run]:
    """The newest run of each runtime and settings."""
    best: dict[str, Run] = {}
    for run in sorted(runs, key=lambda r: (not r.flags, r.ended_at)):
        best[canonical_json([run.conditions["method"], _asked(run)])] = run
    return list(best.values())


def _asked(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.conditions["settings"].items() if name not in _EFFORT}


def _told(run: Run) -> str:
    """The settings that are not the runtime's defaults, as ``key=value``; all, where the runtime is not known here."""
    from core.errors import BadInput
    from core.registry import get

    try:
        default = get("profile", str(run.conditions["method"])).parse({}).model_dump(mode="json")
    except BadInput:
        default = {}
    return " ".join(f"{name}={value}" for name, value in _asked(run).items() if default.get(name) != value)
