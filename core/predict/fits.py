"""On which devices a model fits, and how fast it would be there: one row per device.

Columns (``COLUMNS``): slug, name, kind, engine (missing where no rate can be told), fits, why (``weights too big``, ``context too long`` or empty), next (what would make
it fit), needed_bytes, weights_bytes, kv_bytes, usable_bytes, longest_context, decode_tokens_per_s, ttft_ms, each with
``_low`` and ``_high`` (NaN where it does not fit or nothing tells), bound, anchored, extrapolated, basis, confidence (of the device's figures), source.
Everything is modelled but what the anchors rest on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from core.devices.registry import Device
from core.errors import BadInput
from core.predict.anchors import Observed, anchor_of, known_devices, observed
from core.predict.model import Shape
from core.predict.predict import Band, Prediction, Workload, predict
from core.predict.source import variant_shape
from core.types import Progress, silent

if TYPE_CHECKING:
    from core.catalog.store import Catalog

RATES = tuple(f"{name}{end}" for name in ("decode_tokens_per_s", "ttft_ms") for end in ("", "_low", "_high"))
COLUMNS = (
    *("slug", "name", "kind", "engine", "fits", "why", "next"),
    *("needed_bytes", "weights_bytes", "kv_bytes", "usable_bytes", "longest_context"),
    *RATES,
    *("bound", "anchored", "extrapolated", "basis", "confidence", "source"),
)


def fits_on(
    of: Catalog | Shape,
    variant: str | None = None,
    *,
    workload: Workload | None = None,
    known: Mapping[str, Device] | None = None,
    seen: Sequence[Observed] = (),
    progress: Progress = silent,
) -> pd.DataFrame:
    """One row per device, those it fits first, the fastest first.

    ``of`` is a shape, with what was ``seen`` on devices, or a catalog in which ``variant`` is; its own measurements then
    are what was seen. Raises ``BadInput`` (unknown variant, more context than the model has), ``CannotOpen``.
    """
    if isinstance(of, Shape):
        shape = of
    elif variant is None:
        raise BadInput("name the variant of the catalog that is to be predicted")
    else:
        shape, seen = variant_shape(of, variant, progress), observed(of, progress)
    found = [
        predict(shape, device, workload, anchor=anchor_of(device, shape, seen))
        for device in (known_devices() if known is None else known).values()
    ]
    frame = pd.DataFrame([row_of(one) for one in found], columns=list(COLUMNS))
    frame = frame.astype(dict.fromkeys(RATES, float))
    order = ["fits", "decode_tokens_per_s", "usable_bytes"]
    return frame.sort_values(order, ascending=False, kind="stable", ignore_index=True)


def row_of(one: Prediction) -> dict[str, object]:
    """A prediction as a row."""
    return {
        "slug": one.device.slug,
        "name": one.device.name,
        "kind": one.device.kind,
        "engine": one.engine,
        "fits": one.fits,
        "why": one.why,
        "next": one.next_step,
        "needed_bytes": one.need.total,
        "weights_bytes": one.need.weights,
        "kv_bytes": one.need.kv,
        "usable_bytes": one.device.usable_bytes,
        "longest_context": one.longest_context,
        **_ends("decode_tokens_per_s", one.decode_tokens_per_s),
        **_ends("ttft_ms", one.ttft_ms),
        "bound": one.bound,
        "anchored": one.anchor is not None,
        "extrapolated": one.extrapolated,
        "basis": one.basis,
        "confidence": one.device.confidence,
        "source": one.device.source,
    }


def _ends(name: str, band: Band | None) -> dict[str, float | None]:
    value, low, high = (band.value, band.low, band.high) if band else (None, None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
