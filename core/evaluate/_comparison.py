"""What every comparison of a variant with its base refuses, and what it records of the two models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from core.errors import BadInput
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.registry import Settings
from core.types import Documents, Provenance


class Material(Protocol):
    """What two models are compared on: text or pictures, named and hashed by content."""

    @property
    def name(self) -> str:
        """What a reader knows it by."""

    @property
    def fingerprint(self) -> str:
        """Content hash of all of it."""


def refuse_calibration(documents: Documents) -> None:
    """Raise ``BadInput`` for text that a variant may have been fitted to."""
    if documents.split != "evaluation":
        what = "calibration" if documents.split == "calibration" else "training"
        raise BadInput(
            f"{documents.name} was loaded for {what}, and a variant may have been fitted to it; "
            "evaluate on the evaluation half"
        )


def provenance(
    base: LoadedModel,
    variant: LoadedModel,
    material: Material,
    *,
    method: str,
    protocol: str,
    settings: Settings,
    began: float,
    conditions: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    role: Literal["documents", "images"] = "documents",
) -> Provenance:
    """What one evaluation was computed from; ``began`` is the ``time.perf_counter`` at its beginning."""
    return Provenance(
        method=method,
        settings=settings.model_dump(mode="json"),
        model_fingerprint=variant.fingerprint,
        inputs={role: material.fingerprint, **(inputs or {})},
        dtype=variant.dtype,
        device=variant.device,
        attention_kernel=str(variant.model.config._attn_implementation),
        protocol=protocol,
        conditions={
            "text" if role == "documents" else role: material.name,
            **conditions,
            "threads": torch.get_num_threads(),
            "base_dtype": base.dtype,
            "base_fingerprint": base.fingerprint,
        },
        seconds=time.perf_counter() - began,
    )
