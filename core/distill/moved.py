"""What a training did to every tensor: how far it moved, or why it stayed. Knows no loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.saving.report import Error, row, table

if TYPE_CHECKING:
    from torch import Tensor


def copies(loaded: LoadedModel) -> dict[str, Tensor]:
    """Every parameter as it is now, by name; tied ones once."""
    return {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}


def moved(loaded: LoadedModel, before: Mapping[str, Tensor], *, stayed: str) -> pd.DataFrame:
    """A compress step's table of every tensor against ``before``; ``stayed`` says why those that did not move stayed.

    A packed weight is described by what it is stored as, a plain one by its dtype.
    """
    parameters = dict(loaded.model.named_parameters())
    return table([_row(loaded, t, parameters[t.name], before.get(t.name), stayed) for t in targets(loaded)])


def _row(
    loaded: LoadedModel, target: Target, parameter: Any, before: Tensor | None, stayed: str
) -> dict[str, Any]:
    weight, packed = parameter.detach(), loaded.packed.get(target.module)
    nbytes = weight.nbytes if packed is None else packed.stored_bytes
    error = Error(0.0, None) if before is None else Error.between(before, weight)
    touched = error.relative > 0
    return row(
        target, parameter,
        format_=str(weight.dtype).removeprefix("torch.") if packed is None
        else " + ".join(scheme.label for scheme in packed.schemes),
        bits=8 * nbytes / weight.numel(), group_size="none", bytes_before=nbytes, bytes_after=nbytes, error=error,
        touched=touched, reason="" if touched else stayed,
    )  # fmt: skip
