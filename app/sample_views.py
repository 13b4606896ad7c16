"""Raw samples on their way to a chart: strips, medians, one run in order, the ratios of paired blocks, pace by minute.

Plain functions over the frames that profiles and races keep, and over the rows of ``app.profile_views``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from app.profile_views import Phase, loss_words
from app.views import thinned

DRAWN = 20
"""Cells drawn as distributions at most; the table has all."""
STRIPS = 4_000
"""Samples drawn at most, of all cells together."""


# --- distributions --------------------------------------------------------------------------------------


def strips(rows: pd.DataFrame, samples: Mapping[str, pd.DataFrame], phase: Phase) -> pd.DataFrame:
    """The timed samples of each row: label, run, value_ms, share (rank, 0–1), contended; at most ``STRIPS`` of all.

    Warm-up is left out, contended samples are not: they are marked.
    """
    parts = []
    for label, run in zip(rows["label"], rows["run"], strict=True):
        if run not in samples:
            continue
        frame = samples[run]
        warm = frame[(frame["phase"] == phase) & ~frame["warmup"].astype(bool)].sort_values("value_ms")
        share = (np.arange(len(warm)) + 1) / max(1, len(warm))
        part = warm[["value_ms"]].assign(
            label=label, run=run, share=share, contended=warm["contended"].astype(bool)
        )
        parts.append(thinned(part, max(20, STRIPS // max(1, len(rows)))))
    return (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(columns=["value_ms", "label", "run", "share", "contended"])
    )


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """The median and its interval of each row, with what stands beside it."""
    return rows[
        ["label", "run", "variant", "name", "time_ms", "time_low", "time_high", "rate", "rate_unit"]
    ].assign(
        told=[loss_words(row) for _, row in rows.iterrows()], flagged=rows["status"] != "valid", n=rows["n"]
    )


def in_order(samples: pd.DataFrame, phase: Phase) -> pd.DataFrame:
    """One run's samples of a phase in the order they were taken: iteration, value_ms, kind, other_cpu, clock_mhz."""
    own = samples[samples["phase"] == phase]
    kind = np.select(
        [own["warmup"].astype(bool), own["contended"].astype(bool)], ["warm-up", "contended"], "measured"
    )
    columns = [name for name in ("iteration", "value_ms", "other_cpu", "clock_mhz") if name in own]
    return thinned(own[columns].assign(kind=kind), 2_000)


# --- A against B ----------------------------------------------------------------------------------------


def block_ratios(stretches: pd.DataFrame) -> pd.DataFrame:
    """From a race's ``blocks`` frame: block, ratio (speed of b over a), contended, first (which side began)."""
    logs = stretches.assign(log_ms=np.log(stretches["value_ms"]))
    wide = logs.pivot_table(index="block", columns="side", values="log_ms", aggfunc="mean")
    began = stretches[stretches["order"] == 0].set_index("block")["side"]
    frame = pd.DataFrame({"ratio": np.exp(wide["a"] - wide["b"]), "first": began})
    contended = stretches.groupby("block")["contended"].any() if "contended" in stretches else False
    return frame.assign(contended=contended).reset_index()
