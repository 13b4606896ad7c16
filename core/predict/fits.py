"""Where a model would run, and how fast: one row per device of the registry, modelled and never measured.

``fits_on`` gives:

- slug, name, kind, engine (empty where no rate can be told)
- fits; why: empty, ``weights too big`` (no context would help), or ``context too long`` (a shorter one fits)
- needed_bytes, weights_bytes, kv_bytes, usable_bytes; longest_context: tokens that fit (0 if the weights do not)
- decode_tokens_per_s, ttft_ms, each with ``_low`` and ``_high``: the band in which 80 % of held-out published figures of
  that class lay (``track_record``); NaN where the model does not fit or the device's rates are not known
- confidence and source of the device's figures
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from core.devices.registry import Device, devices
from core.predict.classes import efficiencies
from core.predict.memory import longest_context, need
from core.predict.model import Shape
from core.predict.rate import decode_seconds, prefill_seconds
from core.predict.track_record import band

COLUMNS = (
    *("slug", "name", "kind", "engine", "fits", "why"),
    *("needed_bytes", "weights_bytes", "kv_bytes", "usable_bytes", "longest_context"),
    *("decode_tokens_per_s", "decode_tokens_per_s_low", "decode_tokens_per_s_high"),
    *("ttft_ms", "ttft_ms_low", "ttft_ms_high", "confidence", "source"),
)


def fits_on(
    shape: Shape,
    *,
    context: int = 2048,
    prompt: int = 256,
    batch: int = 1,
    kv_bytes: float = 2,
    known: Mapping[str, Device] | None = None,
) -> pd.DataFrame:
    """Every device, those on which the model fits first, the fastest first; see the module for the columns.

    ``context`` is tokens in the cache when a step is timed and for which room is needed; ``kv_bytes`` those of a cached
    number. ``known`` defaults to the registry with the user's own devices.
    """
    rows = [
        _row(shape, device, context, prompt, batch, kv_bytes)
        for device in (devices() if known is None else known).values()
    ]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.sort_values(
        ["fits", "decode_tokens_per_s"], ascending=[False, False], na_position="last", ignore_index=True
    )


def _row(
    shape: Shape, device: Device, context: int, prompt: int, batch: int, kv_bytes: float
) -> dict[str, object]:
    engine = device.engines[0] if device.engines else None
    needed = need(shape, context, batch=batch, kv_bytes=kv_bytes, engine=engine)
    longest = longest_context(shape, device.usable_bytes, batch=batch, kv_bytes=kv_bytes, engine=engine)
    fits = needed.total <= device.usable_bytes
    why = "" if fits else "context too long" if longest else "weights too big"
    row: dict[str, object] = {
        "slug": device.slug,
        "name": device.name,
        "kind": device.kind,
        "engine": engine or "",
        "fits": fits,
        "why": why,
        "needed_bytes": needed.total,
        "weights_bytes": needed.weights,
        "kv_bytes": needed.kv,
        "usable_bytes": device.usable_bytes,
        "longest_context": longest,
        "confidence": device.confidence,
        "source": device.source,
    }
    rates = ("decode_tokens_per_s", "ttft_ms")
    row |= {f"{name}{end}": np.nan for name in rates for end in ("", "_low", "_high")}
    learned = efficiencies().get(engine) if engine else None
    pace = learned.pace(device) if learned else None
    if engine is None or pace is None or not fits:
        return row
    low, high = band(engine)
    if shape.family == "decoder":
        rate = batch / decode_seconds(shape, pace, context, batch=batch, kv_bytes=kv_bytes)
        row |= {
            "decode_tokens_per_s": rate,
            "decode_tokens_per_s_low": rate * low,
            "decode_tokens_per_s_high": rate * high,
        }
    seconds = prefill_seconds(shape, pace, prompt, batch=batch)
    if seconds is not None:
        row |= {
            "ttft_ms": seconds * 1e3,
            "ttft_ms_low": seconds * 1e3 / high,
            "ttft_ms_high": seconds * 1e3 / low,
        }
    return row
