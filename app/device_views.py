"""Frames of the Devices page: the registry, where a model fits, what predictions are worth, in units people read.

Plain functions, records and frames in, frames out; nothing here draws.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from app import format as fmt
from core.devices.registry import Device
from core.predict.published import rows as published_rows

EXAMPLE = """# One device per name; `like:` starts from a published one, and only what differs is said.
# No secrets here: an address is a Host of your own ~/.ssh/config, or a serial number of `adb devices`.
my-pi:
  like: raspberry-pi-5-8gb
  name: The Pi in the lab
  transport: ssh
  address: lab-pi
"""
"""What the editor begins with where there is no file yet."""


def registry_table(known: Mapping[str, Device]) -> pd.DataFrame:
    """Every device, one's own first: rates in GB/s and T(FL)OP/s, memory in GiB."""
    count = pd.Series([row.device.slug for row in published_rows()], dtype=object).value_counts()
    rows = [
        {
            "slug": device.slug,
            "name": device.name,
            "kind": device.kind,
            "usable": device.usable_bytes / 2**30,
            "bandwidth": _in(device.bandwidth, 1e9),
            "fp16": _in(device.fp16, 1e12),
            "int8": _in(device.int8, 1e12),
            "power": "" if device.power_w is None else f"{device.power_w[0]:g}–{device.power_w[1]:g} W",
            "confidence": device.confidence,
            "source": device.source,
            "as_of": device.as_of,
            "own": device.own,
            "rates": int(count.get(device.slug, 0)),
            "engines": ", ".join(device.engines),
            "memory": device.ram_bytes / 2**30,
            "note": device.note,
            "reached": "" if device.transport == "none" else f"{device.transport} {device.address}".strip(),
        }
        for device in known.values()
    ]
    frame = pd.DataFrame(rows).astype({"bandwidth": float, "fp16": float, "int8": float})
    return frame.sort_values("own", ascending=False, kind="stable", ignore_index=True)


def _in(value: float | None, scale: float) -> float:
    return np.nan if value is None else value / scale


def fits_table(fits: pd.DataFrame) -> pd.DataFrame:
    """Where a model fits, as the page shows it: ``core.predict.fits`` in words and units."""
    rate = "decode_tokens_per_s"
    return pd.DataFrame(
        {
            "slug": fits["slug"],
            "name": fits["name"],
            "kind": fits["kind"],
            "state": [["fits"] if ok else [why] for ok, why in zip(fits["fits"], fits["why"], strict=True)],
            "share": fits["needed_bytes"] / fits["usable_bytes"],
            "needed": fits["needed_bytes"].map(fmt.size),
            "decode": fits[rate],
            "decode_band": _band(fits, rate),
            "ttft": fits["ttft_ms"],
            "ttft_band": _band(fits, "ttft_ms"),
            "longest": fits["longest_context"],
            "told": np.where(fits["anchored"], "scaled by own", "modelled"),
            "next": fits["next"],
            "basis": fits["basis"],
            "confidence": fits["confidence"],
            "source": fits["source"],
        }
    )


def _band(frame: pd.DataFrame, name: str) -> list[str]:
    return [
        fmt.interval(low, high) for low, high in zip(frame[f"{name}_low"], frame[f"{name}_high"], strict=True)
    ]


def counts(fits: pd.DataFrame) -> dict[str, int]:
    """How many devices it fits, and for how many the weights or only the context are too big."""
    return {
        "fits": int(fits["fits"].sum()),
        "context too long": int((fits["why"] == "context too long").sum()),
        "weights too big": int((fits["why"] == "weights too big").sum()),
        "all": len(fits),
    }


def bands(fits: pd.DataFrame, most: int = 40) -> pd.DataFrame:
    """The predicted rates with their bands, the fastest ``most``: name, kind, decode, low, high, told."""
    kept = fits.dropna(subset=["decode_tokens_per_s"]).head(most)
    return pd.DataFrame(
        {
            "slug": kept["slug"],
            "name": kept["name"],
            "kind": kept["kind"],
            "decode": kept["decode_tokens_per_s"],
            "low": kept["decode_tokens_per_s_low"],
            "high": kept["decode_tokens_per_s_high"],
            "told": np.where(kept["anchored"], "scaled by own measurement", "modelled"),
        }
    )


def record_table(record: pd.DataFrame) -> pd.DataFrame:
    """Published figures beside what was predicted without their device, the worst first."""
    ordered = record.reindex(record["error"].abs().sort_values(ascending=False).index)
    columns = [
        "name",
        "engine",
        "model",
        "format",
        "published",
        "predicted",
        "error",
        "inside",
        "share",
        "flag",
        "source",
    ]
    return ordered[columns].reset_index(drop=True)
