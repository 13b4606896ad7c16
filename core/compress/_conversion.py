"""What the methods between dense models and mixtures of experts report alike: sizes, exactness, what it became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import pandas as pd
from pydantic import model_validator

from core.models.loaded import LoadedModel
from core.models.sizes import active_parameters
from core.registry import Settings
from core.reshape.structure import Inventory, structural_result
from core.types import Documents, Metric, Result, View


class RoutedSettings(Settings):
    """Settings of a method that makes experts; a token gets at most as many as there are."""

    experts: int
    top_k: int

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"a token cannot be routed to {self.top_k} of {self.experts} experts")
        return self


@dataclass(frozen=True)
class Source:
    """The model before its architecture is changed."""

    inventory: Inventory
    architecture: str
    nbytes: int
    active_parameters: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> Source:
        """Take stock; call it before anything is changed. Raises ``CannotCompress`` after a quantizing step."""
        loaded.refuse_if_packed()
        return cls(
            Inventory.of(loaded), loaded.anatomy.architecture, loaded.nbytes, active_parameters(loaded)
        )


def converted_result(
    source: Source,
    loaded: LoadedModel,
    settings: Settings,
    *,
    method: str,
    exactness: tuple[float, str],
    frames: Mapping[str, pd.DataFrame] | None = None,
    views: Sequence[View] = (),
    metrics: Sequence[Metric] = (),
    notes: Sequence[str] = (),
    calibration: Documents | None = None,
) -> Result:
    """The result of a step after which ``loaded`` is of another architecture; ``exactness`` is gap and check."""
    gap, check = exactness
    active = active_parameters(loaded)
    conditions: dict[str, Any] = {"architecture": [source.architecture, loaded.anatomy.architecture]}
    result = structural_result(
        source.inventory,
        loaded,
        settings,
        method=method,
        frames=frames,
        views=views,
        metrics=(
            *metrics,
            Metric("size_ratio", loaded.nbytes / source.nbytes, "×", "lower"),
            Metric("active_parameters_before", source.active_parameters, "", "neither"),
            Metric("active_parameters", active, "", "lower"),
        ),
        notes=(_sizes(source, loaded, active), *notes),
        inputs={"calibration": calibration.fingerprint} if calibration is not None else None,
        conditions=conditions,
    )
    return replace(result, provenance=replace(result.provenance, exactness_gap=gap, exactness_check=check))


def _sizes(source: Source, loaded: LoadedModel, active: int) -> str:
    ratio = loaded.nbytes / source.nbytes
    how = "larger" if ratio > 1 else "smaller"
    return (
        f"{source.architecture} became {loaded.anatomy.architecture}, {how} than before: {source.nbytes / 1e6:.1f} MB "
        f"became {loaded.nbytes / 1e6:.1f} MB ({ratio:.2f} ×). Each token uses {active / 1e6:.2f} M parameters, before "
        f"{source.active_parameters / 1e6:.2f} M."
    )
