"""The provenance record that every training fills in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.types import Documents, Provenance

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.registry import Settings


def provenance(
    loaded: LoadedModel,
    documents: Documents,
    *,
    method: str,
    settings: Settings,
    conditions: Mapping[str, Any],
    seconds: float,
    exactness_gap: float,
    exactness_check: str,
) -> Provenance:
    """What one training was made from."""
    return Provenance(
        method=method,
        settings=settings.model_dump(mode="json"),
        model_fingerprint=loaded.fingerprint,
        inputs={"documents": documents.fingerprint},
        dtype=loaded.dtype,
        device=loaded.device,
        attention_kernel=str(loaded.model.config._attn_implementation),
        conditions=conditions,
        seconds=seconds,
        exactness_gap=exactness_gap,
        exactness_check=exactness_check,
    )
