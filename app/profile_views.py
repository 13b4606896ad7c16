"""Frames for the Profile page: every measured phase of a base's variants, what is fastest at which loss, raw samples.

Plain functions, records and frames in, frames out; nothing here draws or reads the catalog. ``rows_of`` gives one row per
profile run that measured a phase:

- run, variant, name, runtime, workload (prompt, new tokens, batch, depth; speeds of two are not comparable), settings (what
  else is not default, in words), label (name, runtime and settings), is_base
- time_ms with low and high (of one step, median), rate with low and high, rate_unit, n
- parity_kl (to the same artifact in float32), parity_low, parity_high; loss (to the base) with low and high; NaN where unknown
- memory_bytes
- status, flags, ended_at, newest (of all runs of this variant, runtime and settings)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from app import format as fmt
from core.errors import BadInput
from core.profile.comparability import Badge, tier_of
from core.profile.roofline import TIMES, measured
from core.profile.runtimes._base import PLAIN
from core.registry import get, methods
from core.types import Family, Measurement, Run, Variant, canonical_json

Phase = Literal["decode", "prefill", "forward"]
PHASES_OF: dict[Family, tuple[Phase, ...]] = {
    "decoder": ("decode", "prefill"),
    "encoder": ("forward",),
    "vision": ("forward",),
    "classifier": ("forward",),
}
TITLES: dict[Phase, str] = {"decode": "Decode", "prefill": "Prefill", "forward": "Forward"}
RATES: dict[Phase, tuple[str, ...]] = {
    "decode": ("decode_tokens_per_s",),
    "prefill": ("prefill_tokens_per_s",),
    "forward": ("images_per_s", "prefill_tokens_per_s"),
}
EFFORT = ("tier", "seed", "parity", "when_busy")
"""Settings that change how a phase is measured, never what."""
WORKLOAD = {"prompt_tokens": "prompt", "new_tokens": "new tokens", "batch": "batch", "depth": "depth"}
"""Settings that change what is measured, with their words."""
TOLERANCE = 0.01
"""Nats per token: what int8 loses, and what nobody notices."""
COLUMNS = (
    *("run", "variant", "name", "runtime", "workload", "settings", "label", "is_base"),
    *("time_ms", "time_low", "time_high", "rate", "rate_low", "rate_high", "rate_unit", "n"),
    *("parity_kl", "parity_low", "parity_high", "loss", "loss_low", "loss_high"),
    *("memory_bytes", "status", "flags", "ended_at", "newest"),
)


# --- every measured phase -------------------------------------------------------------------------------


def rows_of(variants: Sequence[Variant], runs: Mapping[str, Sequence[Run]], phase: Phase) -> pd.DataFrame:
    """One row per run that measured ``phase``, the fastest first; ``runs`` are by variant, newest first."""
    rows = [
        row
        for variant in variants
        for run in runs.get(variant.id, ())
        if run.kind == "profile" and (row := _row(variant, run, phase)) is not None
    ]
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "cell"])
    order = frame.assign(valid=frame["status"] == "valid").sort_values(["valid", "ended_at"], ascending=False)
    frame["newest"] = ~order.duplicated("cell").reindex(frame.index)
    numbers = [name for name in COLUMNS if name.startswith(("time_", "rate", "parity", "loss", "memory"))]
    numbers.remove("rate_unit")
    frame = frame.drop(columns="cell").astype(dict.fromkeys(numbers, float))
    return frame.sort_values("time_ms", ignore_index=True)


def _row(variant: Variant, run: Run, phase: Phase) -> dict[str, Any] | None:
    time = measured(run, TIMES[phase])
    rate = next((m for stem in RATES[phase] if (m := measured(run, stem)) is not None), None)
    if time is None or rate is None:
        return None
    runtime, settings = str(run.conditions.get("method", PLAIN)), told_settings(run)
    base = variant.id == variant.base_id
    parity = measured(run, "parity_kl")
    loss = measured(run, "parity_kl_base") or (parity if base else None)
    if parity is not None and parity.name.startswith("parity_kl_base"):
        parity = None
    memory = measured(run, "peak_memory_bytes")
    return {
        "run": run.id,
        "variant": variant.id,
        "name": variant.name,
        "runtime": runtime,
        "workload": workload_of(run),
        "settings": settings,
        "label": " · ".join(part for part in (variant.name, runtime_title(runtime), settings) if part),
        "is_base": base,
        "time_ms": time.value,
        "time_low": time.low,
        "time_high": time.high,
        "rate": rate.value,
        "rate_low": rate.low,
        "rate_high": rate.high,
        "rate_unit": rate.unit,
        "n": time.n,
        **_interval("parity", parity, "parity_kl"),
        **_interval("loss", loss, "loss"),
        "memory_bytes": memory.value if memory else None,
        "status": run.status,
        "flags": " ".join(run.flags),
        "ended_at": run.ended_at,
        "newest": True,
        "cell": canonical_json([variant.id, runtime, _asked(run), run.conditions.get("device")]),
    }


def _interval(stem: str, found: Measurement | None, value: str) -> dict[str, float | None]:
    return {
        value: found.value if found else None,
        f"{stem}_low": found.low if found else None,
        f"{stem}_high": found.high if found else None,
    }


def runtime_title(id_: str) -> str:
    """A runtime's title; its id where this version does not know it."""
    known = methods("profile")
    return known[id_].title if id_ in known else id_


def _asked(run: Run) -> dict[str, Any]:
    settings = run.conditions.get("settings", {})
    return {name: value for name, value in settings.items() if name not in EFFORT}


def workload_of(run: Run) -> str:
    """What the run's steps had to do, as ``prompt 256, new tokens 32, batch 1``."""
    asked = run.conditions.get("settings", {})
    return ", ".join(f"{words} {asked[name]}" for name, words in WORKLOAD.items() if asked.get(name))


def workloads(rows: pd.DataFrame) -> list[str]:
    """The workloads that were measured, the one with the most cells first."""
    return list(rows["workload"].value_counts().index)


def told_settings(run: Run) -> str:
    """The settings beside the workload that are not the runtime's defaults, as ``weights=int8 threads=1``."""
    try:
        default = get("profile", str(run.conditions.get("method"))).parse({}).model_dump(mode="json")
    except BadInput:
        default = {}
    own = {name: value for name, value in _asked(run).items() if name not in WORKLOAD}
    return " ".join(f"{name}={value}" for name, value in own.items() if default.get(name) != value)


# --- the answer -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """One figure at the top of the page."""

    title: str
    row: pd.Series | None
    value: str
    beside: str
    """What it costs: the parity beside every speed."""
    times: float | None
    """Of plain torch on the base, whose row the last headline is."""


def headlines(rows: pd.DataFrame, tolerance: float) -> list[Headline]:
    """Fastest within the tolerance, fastest at any loss, least memory within it, and plain torch as the yardstick."""
    now = rows[rows["newest"]]
    plain = now[now["is_base"] & (now["runtime"] == PLAIN)]
    yardstick = _first(plain.loc[plain["settings"].str.len().sort_values(kind="stable").index])
    kept = now[now["loss"] <= tolerance]
    words = f"KL ≤ {tolerance:g}"
    lightest = kept.dropna(subset=["memory_bytes"]).sort_values("memory_bytes")
    return [
        _headline(f"Fastest, {words}", _first(kept), yardstick),
        _headline("Fastest at any loss", _first(now), yardstick),
        _headline(f"Least memory, {words}", _first(lightest), yardstick, memory=True),
        _headline("Plain torch, the base", yardstick, None),
    ]


def _first(rows: pd.DataFrame) -> pd.Series | None:
    return rows.iloc[0] if len(rows) else None


def _headline(
    title: str, row: pd.Series | None, plain: pd.Series | None, *, memory: bool = False
) -> Headline:
    if row is None:
        return Headline(title, None, fmt.NONE, "nothing measured qualifies", None)
    value = fmt.size(row["memory_bytes"]) if memory else fmt.number(row["rate"], row["rate_unit"])
    times = None
    if plain is not None and row["run"] != plain["run"]:
        times = row["memory_bytes"] / plain["memory_bytes"] if memory else row["rate"] / plain["rate"]
    return Headline(title, row, value, loss_words(row), times)


def loss_words(row: pd.Series) -> str:
    """What a row's answers have lost, in words: ``KL 0.0041`` (to the base) or that nobody looked."""
    if not np.isnan(row["loss"]):
        return f"KL {fmt.significant(row['loss'], 2)}"
    if not np.isnan(row["parity_kl"]):
        return f"KL to its files {fmt.significant(row['parity_kl'], 2)}"
    return "parity not measured"


def badge_words(badge: Badge) -> str:
    """A badge in a few words: ``B, same machine, software and protocol, another session``."""
    return f"{badge.letter}, {badge.why.partition(';')[0]}"


def badges(rows: pd.DataFrame, runs: Mapping[str, Run], reference: str) -> tuple[list[str], list[str]]:
    """For each row, how far it may be compared with the run ``reference``: letters, and why."""
    found = [tier_of(runs[run], runs[reference]) for run in rows["run"]]
    letters = [
        "–" if run == reference else badge.letter for run, badge in zip(rows["run"], found, strict=True)
    ]
    return letters, [
        "the reference" if run == reference else b.why for run, b in zip(rows["run"], found, strict=True)
    ]


def table(rows: pd.DataFrame, runs: Mapping[str, Run], reference: str) -> pd.DataFrame:
    """What the page's table shows, one row per run, badges against ``reference``."""
    letters, why = badges(rows, runs, reference)
    return pd.DataFrame(
        {
            "name": rows["name"],
            "runtime": rows["runtime"].map(runtime_title),
            "settings": rows["settings"],
            "badge": letters,
            "rate": rows["rate"],
            "rate_interval": _intervals(rows, "rate"),
            "time_ms": rows["time_ms"],
            "loss": rows["loss"],
            "parity_kl": rows["parity_kl"],
            "memory": rows["memory_bytes"] / 1e6,
            "n": rows["n"],
            "flags": rows["flags"],
            "why": why,
            "measured": rows["ended_at"].map(fmt.ago),
        }
    )


def _intervals(rows: pd.DataFrame, stem: str) -> list[str]:
    return [
        fmt.interval(low, high) for low, high in zip(rows[f"{stem}_low"], rows[f"{stem}_high"], strict=True)
    ]
