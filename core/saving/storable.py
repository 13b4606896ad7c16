"""New values of weights, in the precision that the base's own file has: a step that refits weights must not double it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from core.models.loaded import LoadedModel
from core.saving.layout import stored_half

if TYPE_CHECKING:
    from torch import Tensor


def storable(loaded: LoadedModel) -> Callable[[Tensor], Tensor]:
    """Rounds a weight to the 16-bit float that most of the base's file is in, where it is in one; keeps its dtype."""
    half = stored_half(loaded)
    return (lambda weight: weight) if half is None else (lambda weight: weight.to(half).to(weight.dtype))
