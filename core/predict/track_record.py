"""How far predictions were off: every published rate predicted from the rows of other devices, and what that allows.

A row's own device is left out whole when its rate is predicted (leave one device out); with ``by="chip"`` every device
with the same chip is (another board, phone or power mode). A class without another device is predicted from all
classes together, which is told (``pooled``). The band that a prediction carries is the ``COVERED`` quantile of these
errors in its class, taken both ways: measured = predicted ÷ or × band. A band of the table is itself made without the
row's device, so that ``inside`` is an honest count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import pandas as pd

from core.devices.registry import EngineClass
from core.predict.classes import ENOUGH, Efficiency, fit
from core.predict.published import Row, rows
from core.predict.rate import Pace, prefill_seconds

COVERED = 0.9
"""Share of the past errors that a band covers."""
ROUGHEST = 3.0
"""The band where nothing at all tells (a prompt in a class without a published one)."""
PLAUSIBLE = (0.05, 1.0)
"""Shares of a bandwidth that a decode step can reach; beyond lie wrong bytes, speculation, caches, throttling."""
By = Literal["device", "chip"]
Phase = Literal["decode", "prefill"]


def track_record(known: Sequence[Row] | None = None, *, by: By = "device") -> pd.DataFrame:
    """One row per published figure, predicted without its device (or chip).

    Columns: device, name, engine, model, format, source, published, predicted (decode tokens/s), error (signed share of
    the published), low, high, inside, share (of the bandwidth, reached), flag (see ``lint``), pooled, n_rows, n_devices
    (behind the prediction), published_prefill, predicted_prefill, prefill_error (NaN where there is none).
    ``known``: other rows than the published ones.
    """
    held = _Held(rows() if known is None else tuple(known), by)
    found = []
    for row in held.known:
        out = frozenset({held.key(row)})
        efficiency, pooled = held.fitted(row.engine, out)
        predicted = held.predicted(row, out)
        band = held.band(row.engine, "decode", out)
        prefill = held.predicted_prefill(row, out)
        published_prefill = np.nan if row.prefill is None or prefill is None else row.prefill
        found.append(
            {
                "device": row.device.slug,
                "name": row.device.name,
                "engine": row.engine,
                "model": row.model,
                "format": row.format,
                "source": row.source,
                "published": row.decode,
                "predicted": predicted,
                "error": predicted / row.decode - 1,
                "low": predicted / band,
                "high": predicted * band,
                "inside": predicted / band <= row.decode <= predicted * band,
                "share": row.share,
                "flag": implausible(row.share),
                "pooled": pooled,
                "n_rows": efficiency.n_rows,
                "n_devices": efficiency.n_devices,
                "published_prefill": published_prefill,
                "predicted_prefill": np.nan if prefill is None else prefill,
                "prefill_error": np.nan if prefill is None else prefill / published_prefill - 1,
            }
        )
    return pd.DataFrame(found)


def median_error(record: pd.DataFrame, column: str = "error") -> float:
    """The median absolute error, as a share."""
    return float(record[column].abs().median())


def by_class(record: pd.DataFrame) -> pd.DataFrame:
    """One row per class and one for all: n, devices, median_error, p90_error, inside, prefill_n, prefill_median_error."""
    groups = [*((str(name), part) for name, part in record.groupby("engine")), ("all", record)]
    return pd.DataFrame(
        {
            "engine": name,
            "n": len(part),
            "devices": part["device"].nunique(),
            "median_error": median_error(part),
            "p90_error": float(part["error"].abs().quantile(0.9)),
            "inside": float(part["inside"].mean()),
            "prefill_n": int(part["prefill_error"].notna().sum()),
            "prefill_median_error": median_error(part, "prefill_error"),
        }
        for name, part in groups
    )


def implausible(share: float) -> str:
    """Why a share of a bandwidth cannot be right, or is suspicious; empty where it is plausible."""
    low, high = PLAUSIBLE
    if share > high:
        return "above the bandwidth: bytes counted wrongly, speculative decoding, or weights in a cache"
    if share < low:
        return "under a twentieth of the bandwidth: throttled, too few threads, or bytes counted wrongly"
    return ""


def lint(known: Iterable[Row]) -> list[str]:
    """One sentence per row whose share of the bandwidth is above 1 or below 0.05."""
    return [
        f"{row.device.slug}, {row.label} ({row.source}): {row.share:.3g} of the bandwidth; {why}"
        for row in known
        if (why := implausible(row.share))
    ]


@cache
def band(engine: EngineClass, phase: Phase) -> float:
    """The factor of a class's band, from all published rows: measured lies within predicted ÷ and × it in 9 of 10."""
    return _published().band(engine, phase, frozenset())


@cache
def anchored_band() -> float:
    """The same factor for a prediction that is scaled by one measurement of another model on the same device."""
    held, errors = _published(), []
    for row in held.known:
        here = [other for other in held.known if other is not row and other.device is row.device]
        here = [other for other in here if other.engine == row.engine]
        if here:
            near = min(here, key=lambda other: abs(np.log(other.read_bytes / row.read_bytes)))
            out = frozenset({held.key(row)})
            scale = near.decode / held.predicted(near, out)
            errors.append(abs(np.log(held.predicted(row, out) * scale / row.decode)))
    return float(np.exp(np.quantile(errors, COVERED)))


@cache
def _published() -> _Held:
    return _Held(rows(), "device")


@dataclass
class _Held:
    """Rows, and what is fitted without some of their devices; every fit is made once."""

    known: tuple[Row, ...]
    by: By
    _fits: dict[tuple[EngineClass, frozenset[str]], tuple[Efficiency, bool]] = field(default_factory=dict)

    def key(self, row: Row) -> str:
        """What is left out together with a row."""
        return row.device.slug if self.by == "device" else row.chip

    def fitted(self, engine: EngineClass, out: frozenset[str]) -> tuple[Efficiency, bool]:
        """A class's numbers without the devices in ``out``, and whether they had to come from all classes."""
        inside = frozenset(self.key(row) for row in self.known if row.engine == engine)
        name = (engine, out & inside)
        if name[1] == inside:
            name = (engine, out)  # the fit is of every class: all that is left out matters
        if name not in self._fits:
            left = [row for row in self.known if self.key(row) not in out]
            same = [row for row in left if row.engine == engine]
            self._fits[name] = (fit(same, engine), False) if same else (fit(left, None), True)
        return self._fits[name]

    def predicted(self, row: Row, out: frozenset[str]) -> float:
        """Tokens per second of a row's decode step."""
        efficiency, _ = self.fitted(row.engine, out)
        seconds = row.read_bytes / (efficiency.share * row.bandwidth)
        return 1 / (seconds + len(row.shape.layers) * efficiency.layer_s)

    def predicted_prefill(self, row: Row, out: frozenset[str]) -> float | None:
        """Tokens per second of a row's prompt; None without a published one, or where nothing tells."""
        pace: Pace | None = self.fitted(row.engine, out)[0].pace(row.device)
        seconds = (
            None if pace is None or row.prefill is None else prefill_seconds(row.shape, pace, row.prompt)
        )
        return None if seconds is None else row.prompt / seconds

    def band(self, engine: EngineClass, phase: Phase, out: frozenset[str]) -> float:
        """The quantile of the errors of a class with enough rows, else of all; without the devices in ``out``."""
        of_class, of_all = [], []
        for row in self.known:
            if self.key(row) not in out and (error := self._error(row, phase, out)) is not None:
                of_all.append(error)
                of_class += [error] if row.engine == engine else []
        errors = of_class if len(of_class) >= ENOUGH else of_all
        return float(np.exp(np.quantile(errors, COVERED))) if errors else ROUGHEST

    def _error(self, row: Row, phase: Phase, out: frozenset[str]) -> float | None:
        without = out | {self.key(row)}
        if phase == "decode":
            return float(abs(np.log(self.predicted(row, without) / row.decode)))
        predicted = self.predicted_prefill(row, without)
        return (
            None if predicted is None or row.prefill is None else float(abs(np.log(predicted / row.prefill)))
        )
