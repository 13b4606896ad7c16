"""Sentence vectors of two models for the same texts, and how similar the texts of a pair are under each.

Legend: N texts or pairs, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from core.errors import BadInput, CannotMeasure
from core.evaluate._intervals import Floats
from core.models.embed import embed
from core.models.loaded import LoadedModel
from core.types import Progress, View


@dataclass
class Vectors:
    """Embeds lists of texts with both models and counts the lists that are done."""

    base: LoadedModel
    variant: LoadedModel
    progress: Progress
    max_tokens: int
    total: int
    done: int = 0
    same_width: bool = True
    """Whether models whose vectors have no cosine with each other are refused."""

    def of(self, texts: Sequence[str], what: str) -> tuple[Floats, Floats]:
        """Vectors [N, d_model] of the base and of the variant; computed once where both are one model."""
        self.progress(self.done, self.total, f"embedding {what}")
        base_ND = self._of_one(self.base, "base", texts)
        variant_ND = base_ND if self.variant is self.base else self._of_one(self.variant, "variant", texts)
        if self.same_width and base_ND.shape != variant_ND.shape:
            raise BadInput(
                f"{self.base.ref} and {self.variant.ref} give vectors of {base_ND.shape[1]} and "
                f"{variant_ND.shape[1]} numbers, which have no cosine; choose a variant of this base"
            )
        self.done += 1
        self.progress(self.done, self.total, f"embedding {what}")
        return base_ND, variant_ND

    def _of_one(self, loaded: LoadedModel, role: str, texts: Sequence[str]) -> Floats:
        vectors_ND: Floats = embed(loaded, texts, max_tokens=self.max_tokens).double().numpy()
        finite_N = np.isfinite(vectors_ND).all(1)
        if not finite_N.all():
            text = texts[int(np.argmin(finite_N))]
            raise CannotMeasure(
                f"the {role} {loaded.ref} gives a vector that is not finite for {text[:60]!r}; "
                "try float32, or discard this variant"
            )
        return vectors_ND


def cosines(first_ND: Floats, second_ND: Floats) -> Floats:
    """[N] cosine of the angle between rows; exactly 1 for equal rows."""
    lengths_N = np.sqrt((first_ND**2).sum(1) * (second_ND**2).sum(1))
    cosine_N: Floats = (first_ND * second_ND).sum(1) / lengths_N
    return cosine_N


def pair_frame(pairs: pd.DataFrame, base_N: Floats, variant_N: Floats) -> pd.DataFrame:
    """The pairs (score, text_a, text_b …) with both models' similarities, the one that moved most first."""
    frame = pairs.assign(similarity_base=base_N, similarity=variant_N, shift=variant_N - base_N)
    return frame.sort_values("shift", key=abs, ascending=False, kind="stable", ignore_index=True)


SIMILARITIES = View(
    "scatter",
    x="similarity_base",
    y="similarity",
    color="score",
    frame="pairs",
    title="Similarity of each labelled pair: variant against base",
    unit="cosine",
    tooltip=("text_a", "text_b", "shift"),
)
