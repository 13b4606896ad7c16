"""Frames of where the time goes: phases under the roofs with their verdicts, looks, their tables joined and their spans.

Plain functions over runs, looks and roofs; nothing here draws, reads the catalog or starts a process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from app import format as fmt
from app.profile_views import TITLES, runtime_title, told_settings
from core.predict.model import Shape
from core.profile.bottleneck import Verdict, verdict
from core.profile.environment import environment
from core.profile.machine import Roofs
from core.profile.roofline import matrix_rate, placed, roof_line, steps_of
from core.profile.where.look import METHOD
from core.profile.where.tables import join_modules
from core.profile.work import Step
from core.types import Result, Run, Variant, canonical_json

SPANS = 1_500
"""Spans drawn at most, the longest; the trace has all."""
ROWS = 300
"""Rows of a table sent to the browser at most."""


@dataclass(frozen=True)
class Placed:
    """One measured phase under the roofs."""

    key: str
    """Run and phase, as the address has them."""
    run: Run
    verdict: Verdict


def under_roofs(
    variants: Sequence[Variant],
    runs: Mapping[str, Sequence[Run]],
    shapes: Mapping[str, Shape],
    chosen: Sequence[str],
    roofs: Roofs,
) -> tuple[pd.DataFrame, dict[str, Placed]]:
    """Every phase of the ``chosen`` runs that were taken on this machine, as the chart shows it, and its verdict by key.

    ``shapes`` are by fingerprint; what has none is left out. Columns of ``core.profile.roofline.placed`` besides key, name,
    label, variant, run, ms, gflops and flagged.
    """
    host, rows, found = environment(roofs.device)["host"], [], {}
    for variant in variants:
        shape = shapes.get(variant.fingerprint)
        for run in runs.get(variant.id, ()):
            if shape is None or run.id not in chosen or not is_here(run, roofs.device, host):
                continue
            for _, step in steps_of(run, shape):
                key = f"{run.id}~{step.phase}"
                found[key] = Placed(key, run, verdict(step, roofs))
                rows.append({"key": key, **_head(variant, run, step), **placed(step, roofs)})
    frame = pd.DataFrame(rows)
    if len(frame):
        frame = frame.assign(ms=frame["seconds"] * 1e3, gflops=frame["attained_flops_per_s"] / 1e9)
    return frame, found


def _head(variant: Variant, run: Run, step: Step) -> dict[str, object]:
    parts = (variant.name, runtime_title(step.runtime), told_settings(run))
    return {
        "variant": variant.id,
        "name": variant.name,
        "run": run.id,
        "label": " · ".join(part for part in parts if part),
        "dtype": step.dtype,
        "flagged": bool(run.flags),
    }


def is_here(run: Run, device: str, host: Mapping[str, object]) -> bool:
    """Whether a run was taken on this very machine and device."""
    taken = run.conditions.get("environment", {}).get("host", {})
    return run.conditions.get("device") == device and canonical_json(taken) == canonical_json(host)


def roofs_for(points: pd.DataFrame, roofs: Roofs) -> pd.DataFrame:
    """The roofs of the dtypes that were measured, as lines a little beyond the points: intensity, gflops, roof (in words).

    Dtypes that are held against one rate share a line.
    """
    dtypes: dict[float, list[str]] = {}
    for dtype in dict.fromkeys(points["dtype"]):
        dtypes.setdefault(matrix_rate(roofs, dtype), []).append(dtype)
    low, high = points["intensity"].min() / 4, points["intensity"].max() * 4
    lines = []
    for rate, names in dtypes.items():
        line = roof_line(roofs, names[0])
        words = f"{' and '.join(names)}: {rate / 1e9:.3g} GFLOP/s, {roofs.read_bytes_per_s() / 1e9:.3g} GB/s"
        lines.append(line[line["intensity"].between(low, high)].assign(roof=words))
    whole = pd.concat(lines, ignore_index=True)
    return whole.assign(gflops=whole["flops_per_s"] / 1e9)[["intensity", "gflops", "roof"]]


def roofline_table(points: pd.DataFrame) -> pd.DataFrame:
    """What stands below the chart, the furthest from its roof first."""
    ordered = points.sort_values("share_of_roof", ignore_index=True)
    return pd.DataFrame(
        {
            "key": ordered["key"],
            "label": ordered["label"],
            "phase": ordered["phase"].map(fmt.label),
            "ms": ordered["ms"],
            "share_of_roof": ordered["share_of_roof"],
            "share_of_bandwidth": ordered["share_of_bandwidth"],
            "share_of_matrix_rate": ordered["share_of_matrix_rate"],
            "read": ordered["bytes"] / 1e6,
            "bound": ordered["bound"],
            "counted": ordered["counted"],
        }
    )


def parts_of(found: Verdict) -> pd.DataFrame:
    """The seconds of a verdict as rows: part, ms, how (measured or modelled)."""
    rows = [
        ("Measured step", found.seconds, "measured"),
        ("Weights, read once at this machine's bandwidth", found.weights_s, "modelled"),
        ("KV cache, the same", found.kv_s, "modelled"),
        ("Multiplications at the matrix rate, beside the reading", found.compute_s, "modelled"),
        ("The rest: calls, and kernels below the roofs", found.rest_s, "measured less modelled"),
    ]
    if found.calls_s is not None:
        rows.append(("Of which calls of empty layers take", found.calls_s, "measured once for this machine"))
    return pd.DataFrame(
        [(what, seconds * 1e3, how) for what, seconds, how in rows], columns=["part", "ms", "how"]
    )


# --- looks ----------------------------------------------------------------------------------------------


def looks(variants: Sequence[Variant], runs: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """Run id → title of every look at where the time goes, newest first."""
    names = {variant.id: variant.name for variant in variants}
    found = [run for id_ in names for run in runs.get(id_, ()) if run.conditions.get("method") == METHOD]
    found.sort(key=lambda run: run.ended_at, reverse=True)
    return {run.id: look_title(names[run.variant_id], run) for run in found}


def look_title(name: str, run: Run) -> str:
    """A look in one line: the model, the runtime, when."""
    return f"{name} · {runtime_title(str(run.conditions.get('runtime')))} · {fmt.ago(run.ended_at)}"


def phases_of(look: Result) -> list[str]:
    """The phases that were looked at, decode first: it is what a user waits for."""
    found = list(look.frames["operators"]["phase"].drop_duplicates())
    return sorted(found, key=lambda phase: list(TITLES).index(phase) if phase in TITLES else len(TITLES))


def components(models: Mapping[str, Result], phase: str) -> pd.DataFrame:
    """Milliseconds by component of each model: component, model, self_ms, share; of operators where no module is known."""
    parts = []
    for name, look in models.items():
        frame = look.frames["components"]
        frame = frame[frame["phase"] == phase]
        if frame.empty:
            operators = look.frames["operators"]
            sums = (
                operators[operators["phase"] == phase]
                .groupby("operator", as_index=False)[["traced_ms", "share"]]
                .sum()
            )
            frame = sums.rename(columns={"operator": "component", "traced_ms": "self_ms"}).nlargest(
                12, "self_ms"
            )
        parts.append(frame[["component", "self_ms", "share"]].assign(model=name))
    return pd.concat(parts, ignore_index=True)


def ranked_modules(look: Result, phase: str) -> pd.DataFrame:
    """The modules of a phase by their own time, the largest first."""
    frame = look.frames["modules"]
    own = frame[frame["phase"] == phase].sort_values("self_ms", ascending=False, ignore_index=True)
    columns = [
        "module",
        "kind",
        "component",
        "layer",
        "calls",
        "self_ms",
        "total_ms",
        "total_low_ms",
        "total_high_ms",
        "share",
    ]
    return own[columns].assign(module=own["module"].replace("", "(whole model)"), layer=_layers(own))


def ranked_operators(look: Result, phase: str) -> pd.DataFrame:
    """The operators of a phase, summed over modules, the largest first."""
    frame = look.frames["operators"]
    own = frame[frame["phase"] == phase]
    sums = own.groupby("operator", as_index=False)[["calls", "traced_ms", "share"]].sum()
    return sums.sort_values("traced_ms", ascending=False, ignore_index=True)


def spans(look: Result, phase: str) -> pd.DataFrame:
    """One step as nested boxes, the longest ``SPANS``: name, start_ms, end_ms, ms, depth, component."""
    events = look.frames["events"]
    own = events[(events["phase"] == phase) & (events["duration_us"] > 0)].nlargest(SPANS, "duration_us")
    modules = look.frames["modules"]
    known = dict(zip(modules["module"], modules["component"], strict=True)) if len(modules) else {}
    name = own["name"].where(own["category"] == "operator", own["name"].replace("", "(whole model)"))
    return pd.DataFrame(
        {
            "name": name,
            "start_ms": own["start_us"] / 1e3,
            "end_ms": (own["start_us"] + own["duration_us"]) / 1e3,
            "ms": own["duration_us"] / 1e3,
            "depth": own["depth"],
            "component": own["module"].map(known).fillna("operator" if not known else "other"),
        }
    ).sort_values(["depth", "start_ms"], ignore_index=True)


def _layers(frame: pd.DataFrame) -> pd.Series[str]:
    """Layers as text, empty where a module belongs to none."""
    return frame["layer"].astype("Int64").astype("string").fillna("").astype(str)


def joined(first: Result, second: Result, phase: str) -> pd.DataFrame:
    """The second look's modules beside the first's, the largest change first."""
    both = join_modules(first.frames["modules"], second.frames["modules"])
    both = both[both["phase"] == phase]
    kept = both.drop(columns=["phase", "kind_a", "kind_b", "depth"])
    return kept.assign(module=kept["module"].replace("", "(whole model)"), layer=_layers(kept))
