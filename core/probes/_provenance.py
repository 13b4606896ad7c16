"""The provenance record that every probe fills in the same way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.lazy import torch
from core.types import Prompt, Provenance

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.registry import Settings


def provenance(
    loaded: LoadedModel,
    prompt: Prompt,
    *,
    method: str,
    settings: Settings,
    started: float,
    conditions: Mapping[str, Any],
    exactness_gap: float | None,
    exactness_check: str,
    attention_kernel: str | None = None,
) -> Provenance:
    """What one probe run was computed from; ``started`` is the ``time.perf_counter`` at its beginning."""
    return Provenance(
        method=method,
        settings=settings.model_dump(mode="json"),
        model_fingerprint=loaded.fingerprint,
        inputs={"prompt": prompt.fingerprint},
        dtype=loaded.dtype,
        device=loaded.device,
        attention_kernel=attention_kernel or str(loaded.model.config._attn_implementation),
        conditions={**conditions, "threads": torch.get_num_threads()},
        seconds=time.perf_counter() - started,
        exactness_gap=exactness_gap,
        exactness_check=exactness_check,
    )
