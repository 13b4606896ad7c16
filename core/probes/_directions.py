"""A direction in the residual stream: from two lists of prompts, or from a feature of a sparse autoencoder.

Legend: S layers (embedding, then after each block), N prompts, D d_model. Knows nothing of what is done with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from core.errors import BadInput, NeedsInput
from core.lazy import torch
from core.probes._read_texts import Position, read_texts
from core.train._sparse_code import direction_by_name
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

MAX_PROMPTS = 200


@dataclass(frozen=True)
class Direction:
    """A vector to add to the residual stream, and where it comes from."""

    layer: int
    """The residual stream after this many blocks."""
    vector_D: Tensor
    """What strength 1 adds, float32: a difference of means, or a feature at its usual size."""
    what: str
    prompts: pd.DataFrame | None = None
    """Per prompt its list, and its projection on the direction; None for a feature."""

    @property
    def unit_D(self) -> Tensor:
        """The same direction with norm 1."""
        unit_D: Tensor = self.vector_D / self.vector_D.norm()
        return unit_D


def split_prompts(text: str) -> list[str]:
    """Prompts separated by line breaks or bars, blanks left out."""
    return [part.strip() for part in re.split(r"[\n|]", text) if part.strip()]


def feature_direction(loaded: LoadedModel, name: str) -> Direction:
    """The direction of ``sae:ARTIFACT:FEATURE``; raises ``BadInput``."""
    found = direction_by_name(loaded, name)
    return Direction(found.layer, found.direction_D.float() * found.typical_strength, name)


def mean_difference(
    loaded: LoadedModel, positives: str, negatives: str, *, layer: int, position: Position, progress: Progress
) -> Direction:
    """Mean residual of the positive prompts minus that of the negative ones, after ``layer`` blocks.

    Raises ``BadInput`` for an empty or too long list, or when both lists have the same mean.
    """
    lists = {"positive": split_prompts(positives), "negative": split_prompts(negatives)}
    for name, prompts in lists.items():
        if not prompts:
            raise NeedsInput(
                f"there is no {name} prompt; give at least one, several are separated by | or new lines"
            )
        if len(prompts) > MAX_PROMPTS:
            raise BadInput(f"there are {len(prompts)} {name} prompts; give at most {MAX_PROMPTS}")
    both = [*lists["positive"], *lists["negative"]]
    n = len(lists["positive"])
    residual_ND = read_texts(
        loaded, both, position=position, progress=progress, message=f"reading {len(both)} prompts"
    )[layer]
    vector_D = residual_ND[:n].mean(0) - residual_ND[n:].mean(0)
    size = float(residual_ND.norm(dim=-1).mean())
    if float(vector_D.norm()) <= 1e-5 * size:
        raise BadInput(
            f"positive and negative prompts have the same mean after {layer} blocks, so there is no direction between "
            "them; give prompts that differ at the position that is read, or choose a later layer"
        )
    return Direction(
        layer,
        vector_D.to(loaded.device),
        f"mean of {n} positive − mean of {len(both) - n} negative prompts",
        separation(both, residual_ND, n),
    )


def separation(texts: list[str], residual_ND: Tensor, n: int) -> pd.DataFrame:
    """Where each prompt lies between the two means made without it: above 0 is the positive side.

    Its counterpart in the other list is left out with it: the pair would otherwise pull the means apart by what only
    these two share. In units of half the distance, so that the means themselves are at 1 and −1. Empty where a list
    has a single prompt.
    """
    rows = []
    plus_ND, minus_ND = residual_ND[:n], residual_ND[n:]
    if min(len(plus_ND), len(minus_ND)) >= 2:
        for index, text in enumerate(texts):
            is_positive = index < n
            place = index if is_positive else index - n
            plus_D, minus_D = _mean_without(plus_ND, place), _mean_without(minus_ND, place)
            vector_D = plus_D - minus_D
            length = vector_D.square().sum().clamp(min=1e-30)
            side = float(2 * ((residual_ND[index] - (plus_D + minus_D) / 2) @ vector_D) / length)
            name = "positive" if is_positive else "negative"
            rows.append({"prompt": text, "list": name, "side": side, "is_right": (side > 0) == is_positive})
    return pd.DataFrame(rows, columns=["prompt", "list", "side", "is_right"])


def _mean_without(residual_ND: Tensor, place: int) -> Tensor:
    """The mean of all rows but one; of all, where there is no such row."""
    kept_N = torch.arange(len(residual_ND)) != place
    return residual_ND[kept_N].mean(0)
