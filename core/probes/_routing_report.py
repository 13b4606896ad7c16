"""What the probes of a mixture of experts have in common once the choices are known: counts, maps, intervals, words.

Legend: L MoE layers, E experts, K slots, T tokens, G groups of documents.

It reads no model: everything here is arrays, frames and sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.evaluate._intervals import wilson
from core.probes._clustered import GROUPS, described, jackknife_half, ratio_half
from core.probes._provenance import provenance
from core.probes._tokens import MAX_CELLS
from core.routing import statistics
from core.types import Better, Metric, Prompt, Provenance

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices, Texts
    from core.registry import Settings
    from core.routing.discover import MoeLayer

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Statistic = Callable[[NDArray[Any]], Floats]
"""Of counts [batch, X], giving [batch, …]."""
FEW_TOKENS = 30
"""Tokens per expert, were they spread evenly, below which a load is mostly luck."""


def count_choices(choices: Choices, *, first: bool = False) -> Ints:
    """Tokens of each group of documents that each expert got, [G, L, E]; ``first`` counts first choices alone."""
    group_T, n_groups = choices.group_T, min(GROUPS, choices.n_documents)
    chosen_LTK = choices.first_LT[..., None] if first else choices.experts_LTK
    return counted_by(chosen_LTK, group_T, n_groups, choices.n_experts)


def counted_by(
    chosen_LTK: NDArray[np.int16],
    owner_T: Ints,
    n_owners: int,
    n_experts: int,
    weights_LTK: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """How often, or with which total weight, each expert was chosen by each owner's tokens: [owners, L, E].

    Slots of expert -1 do not count.
    """
    counted = []
    for layer, chosen_TK in enumerate(chosen_LTK):
        cell_TK = owner_T[:, None] * n_experts + chosen_TK
        used_TK = chosen_TK >= 0
        weights = None if weights_LTK is None else weights_LTK[layer][used_TK]
        cells = np.bincount(cell_TK[used_TK], weights, minlength=n_owners * n_experts)
        counted.append(cells.reshape(n_owners, n_experts))
    return np.stack(counted, axis=1)


def conservation_gap(load_LE: Ints, choices: Choices) -> float:
    """How far the loads of a layer are from adding up to tokens × k, as a share of it; the largest over layers."""
    due = choices.n_tokens * choices.top_k
    return float(np.abs(load_LE.sum(-1) - due).max() / due)


CONSERVED = "largest |Σ load − tokens × k| of a layer, as a share of tokens × k"


def shown_layers(layers: Sequence[int], n_experts: int) -> tuple[int, ...]:
    """The layers of a layer × expert map: all, or every n-th where they were too many cells."""
    stride = -(-len(layers) * n_experts // MAX_CELLS)
    return tuple(layers[::stride])


def shown_rows(frame: pd.DataFrame, layers: Sequence[int], n_experts: int) -> pd.DataFrame:
    """The rows of the layers that a layer × expert map shows."""
    return frame[frame["layer"].isin(shown_layers(layers, n_experts))].reset_index(drop=True)


def shown_note(layers: Sequence[int], n_experts: int) -> tuple[str, ...]:
    """A sentence where a map leaves layers out; tables and curves never do."""
    kept = shown_layers(layers, n_experts)
    if len(kept) == len(layers):
        return ()
    return (f"The maps show {len(kept)} of {len(layers)} MoE layers: all would be over {MAX_CELLS:,} cells.",)


def layer_by_expert(layers: Sequence[int], n_experts: int) -> dict[str, NDArray[Any]]:
    """The columns layer and expert of a map, layers outermost."""
    return {
        "layer": np.repeat(np.asarray(layers), n_experts),
        "expert": np.tile(np.arange(n_experts), len(layers)),
    }


def chosen_place(layer: int, layers: Sequence[int], otherwise: int) -> int:
    """The place of the layer a setting names among the MoE layers; ``otherwise`` where it is -1."""
    from core.probes._routed_text import place_of

    return otherwise if layer < 0 else place_of(layer, layers)


@dataclass(frozen=True)
class Counted:
    """Numbers counted on tokens of documents, shape X, each with half of its 95 % interval."""

    value: Floats
    half: Floats
    n_groups: int

    @classmethod
    def share(cls, numerator_GX: NDArray[Any], denominator_GX: NDArray[Any]) -> Counted:
        """Σ numerator / Σ denominator over groups; NaN where there is nothing to share."""
        with np.errstate(invalid="ignore", divide="ignore"):
            value: Floats = numerator_GX.sum(0) / denominator_GX.sum(0)
            return cls(value, ratio_half(numerator_GX, denominator_GX), len(numerator_GX))

    @classmethod
    def of(cls, counts_GX: NDArray[Any], statistic: Statistic) -> Counted:
        """Any statistic of the counts summed over groups."""
        return cls(statistic(counts_GX.sum(0)[None])[0], jackknife_half(counts_GX, statistic), len(counts_GX))

    def __mul__(self, factor: float) -> Counted:
        return Counted(self.value * factor, self.half * factor, self.n_groups)

    def __getitem__(self, index: Any) -> Counted:
        return Counted(self.value[index], self.half[index], self.n_groups)

    def ends(self, *, low: float = 0.0, high: float = np.inf) -> tuple[Floats, Floats]:
        """Both ends of the intervals, kept inside what the number can be."""
        return np.clip(self.value - self.half, low, high), np.clip(self.value + self.half, low, high)

    def columns(self, name: str, *, high: float = np.inf) -> dict[str, Floats]:
        """The numbers and both ends as columns ``name``, ``name_low``, ``name_high``."""
        below, above = self.ends(high=high)
        return {name: self.value.ravel(), f"{name}_low": below.ravel(), f"{name}_high": above.ravel()}

    def metric(
        self,
        name: str,
        unit: str,
        choices: Choices,
        how: str,
        *,
        better: Better = "neither",
        least: float = 0.0,
    ) -> Metric:
        """A single number as a headline; it cannot be below ``least``."""
        low, high = map(float, self.ends(low=least))
        known = np.isfinite(high)
        return Metric(
            name,
            float(self.value),
            unit,
            better,
            n=choices.n_tokens,
            low=low if known else None,
            high=high if known else None,
            interval=described(choices.n_documents, self.n_groups, how),
        )


def share_ends(hits_GX: NDArray[Any], trials_GX: NDArray[Any]) -> tuple[Floats, Floats]:
    """Interval of shares [X]: the wider of that over documents and Wilson's, which alone is honest at 0 and 1."""
    low_X, high_X = Counted.share(hits_GX, trials_GX).ends(high=1.0)
    hits_X, trials_X = np.broadcast_arrays(hits_GX.sum(0), trials_GX.sum(0))
    each = [wilson(int(hits), max(1, int(n))) for hits, n in zip(hits_X.flat, trials_X.flat, strict=True)]
    wilson_X2 = np.array(each).reshape(*hits_X.shape, 2)
    return np.fmin(low_X, wilson_X2[..., 0]), np.fmax(high_X, wilson_X2[..., 1])


def text_provenance(
    loaded: LoadedModel,
    prompt: Prompt,
    *,
    method: str,
    settings: Settings,
    started: float,
    texts: Texts,
    choices: Choices,
    exactness_gap: float | None,
    exactness_check: str,
    conditions: dict[str, Any] | None = None,
) -> Provenance:
    """What a probe that counts routing was computed from."""
    return provenance(
        loaded,
        prompt,
        method=method,
        settings=settings,
        started=started,
        conditions={
            "text": texts.name,
            "text_fingerprint": texts.fingerprint,
            "tokens": choices.n_tokens,
            "documents": choices.n_documents,
            **(conditions or {}),
        },
        exactness_gap=exactness_gap,
        exactness_check=exactness_check,
    )


def text_notes(texts: Texts, choices: Choices) -> tuple[str, ...]:
    """What text the numbers are of, and when it is too little."""
    routed = f"{choices.n_experts} experts, {choices.top_k} per token, in {len(choices.layers)} MoE layers"
    if texts.is_prompt:
        why = "One text says nothing about others, so there are no intervals; name a text to count on."
        return (f"The prompt alone: {choices.n_tokens} tokens over {routed}. {why}",)
    read = f"{choices.n_tokens:,} tokens of {choices.n_documents} documents of {texts.name} over {routed}"
    return (f"{read}; intervals count documents, because tokens of one document resemble each other.",)


def text_flags(choices: Choices) -> tuple[str, ...]:
    """``few_tokens`` where an even spread would give an expert too few tokens to tell its load from luck."""
    return ("few_tokens",) if choices.n_tokens * choices.top_k < FEW_TOKENS * choices.n_experts else ()


def melted(frame: pd.DataFrame, keys: list[str], names: dict[str, str], value: str) -> pd.DataFrame:
    """Several columns as one, with their readers' names in a column ``series``: what a line chart draws."""
    shown_columns = frame[[*keys, *names]].rename(columns=names)
    return shown_columns.melt(keys, var_name="series", value_name=value)


def busiest(load_E: Ints) -> Ints:
    """The experts that a map of pairs has room for: the busiest, in their own order."""
    most = int(np.sqrt(MAX_CELLS))
    return np.sort(np.argsort(-load_E, kind="stable")[:most])


def busiest_note(shown_E: Ints, n_experts: int) -> tuple[str, ...]:
    """A sentence where a map of pairs leaves experts out."""
    return (
        ()
        if len(shown_E) == n_experts
        else (f"The map shows the {len(shown_E)} busiest of {n_experts} experts.",)
    )


def pair_columns(shown_E: Ints) -> tuple[Ints, Ints]:
    """Row and column expert of every cell of a map of pairs."""
    row_EE, column_EE = np.meshgrid(shown_E, shown_E, indexing="ij")
    return row_EE.ravel(), column_EE.ravel()


def membership(experts_TK: NDArray[np.int16], n_experts: int) -> NDArray[np.float32]:
    """A [T, E]: 1 where a token was given an expert; products of it are exact below 2²⁴."""
    return statistics.dense_weights(experts_TK, np.ones_like(experts_TK, dtype=np.float32), n_experts)


def router_rows(loaded: LoadedModel, layer: MoeLayer) -> Any:
    """The router's weights with a row per expert, [E, D], its own parameter; None for a router that has none."""
    parameters = loaded.model.get_submodule(layer.router).parameters()
    return next((p for p in parameters if p.ndim == 2 and len(p) == layer.n_experts), None)
