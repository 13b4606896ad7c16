"""Routing margin: how close each decision was, and whether close decisions are the ones that rounding the router flips.

Legend: L MoE layers, T tokens, K slots, E experts, Q bins of the margin.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput, CannotMeasure
from core.lazy import torch
from core.numerics.integer import quantize
from core.numerics.schemes import IntegerScheme
from core.probes._routed_text import TextSettings, choices_of, find_texts, readings, text_cost
from core.probes._routing_report import (
    Counted,
    chosen_place,
    router_rows,
    share_ends,
    text_flags,
    text_notes,
    text_provenance,
)
from core.registry import Example, method
from core.routing.discover import moe_layers
from core.routing.rules import choice_scores
from core.routing.scores import CHOSEN_BY_LOGIT
from core.routing.statistics import overlap_at_k
from core.types import Cost, Metric, Progress, Prompt, Result, View, part_of

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices
    from core.probes._routing_report import Floats
    from core.routing.lens import Routed

BINS = 10
PERCENT = (1, 5, 25, 50, 75, 95, 99)
"""Quantiles of the margin that are drawn."""


class RoutingMarginSettings(TextSettings):
    """On what text, and how far routers are rounded to see decisions flip."""

    bits: int = Field(
        4,
        ge=2,
        le=8,
        description="Bits that all routers' weights are rounded to, per row, to see which decisions flip",
    )
    layer: int = Field(
        -1,
        ge=-1,
        le=1024,
        description="Layer (block index) whose flips are drawn; -1: the first, where nothing else moved",
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: RoutingMarginSettings) -> Cost:
    """The text twice: as the model routes, and with rounded routers."""
    once = text_cost(anatomy, n_tokens, settings)
    return Cost(2 * once.forwards, 2 * once.extra_bytes)


@method(
    "probe",
    title="Routing margin",
    needs=["moe", "text"],
    paper="https://arxiv.org/abs/2409.02060",
    answers="Which expert does what?",
    examples=(
        Example("Which decisions does a 4-bit router flip?", Prompt("(the text is read; the prompt is not)")),
        Example("And an 8-bit one?", Prompt("(the text is read; the prompt is not)"), {"bits": 8}),
    ),
    cost=_cost,
)
def routing_margin(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: RoutingMarginSettings
) -> Result:
    """Measure how close every routing decision was, and test that the close ones flip.

    The margin of a token is the router's k-th logit minus its (k + 1)-th: how far the logits may move towards each other
    before another expert is chosen. Routers that choose by a score (sigmoid plus bias, best groups first) have it in units of that
    score. As a test, all routers' weights are rounded to few bits and the same text is read again: a token is flipped
    where its set of experts changed. flips_told is the probability that a flipped token had the smaller margin of
    a flipped and a kept one (area under the ROC curve; 0.5: the margin says nothing). Behind the first MoE layer the rounding also moves what
    the router reads. Intervals are 95 % over documents. The model's own weights are put back.
    """
    started = time.perf_counter()
    texts = find_texts(loaded, prompt, settings.text)
    watched = _Margins(loaded)
    original = list(
        readings(loaded, texts, part_of(progress, 0, 0.5), max_tokens=settings.max_tokens, keep=watched.of)
    )
    margin_LT = np.concatenate([np.stack(one.kept) for one in original], axis=1)
    choices = choices_of(loaded, original)
    with loaded.lock, rounded_routers(loaded, settings.bits) as largest_move:
        rounded = choices_of(
            loaded, readings(loaded, texts, part_of(progress, 0.5, 1), max_tokens=settings.max_tokens)
        )
    flipped_LT = overlap_at_k(choices.experts_LTK, rounded.experts_LTK) < 1
    place = chosen_place(settings.layer, choices.layers, 0)
    layers = layer_table(margin_LT, flipped_LT, choices)
    return Result(
        frames={
            "layers": layers,
            "quantiles": _quantiles(margin_LT, choices),
            "flips": flip_curve(margin_LT[place], flipped_LT[place], choices),
        },
        views=_views(choices.layers[place], settings.bits, watched.unit),
        metrics=_metrics(layers, place, margin_LT, flipped_LT, choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="routing_margin",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=float((margin_LT < 0).mean()),
            exactness_check="share of decisions with a negative margin: an expert left out that scored above a chosen one",
            conditions={"largest_router_change": largest_move},
        ),
        notes=(
            *text_notes(texts, choices),
            f"Margins are in {watched.unit}. Routers were rounded to {settings.bits} bits per weight, one scale per expert.",
        ),
        flags=text_flags(choices),
    )


class _Margins:
    """Reads the margin of every decision from the router's own logits."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Raise ``CannotMeasure`` for a router whose rule is not known."""
        self._layers = {layer.layer: layer for layer in moe_layers(loaded)}
        self._model = loaded.model
        unknown = [layer for layer in self._layers.values() if layer.rule == "unknown"]
        if unknown:
            raise CannotMeasure(
                f"{unknown[0].router} ({unknown[0].router_class}) routes by a rule that is not known here, so what its logits mean is "
                "not either; its decisions can be seen with expert_load and routing_path"
            )

    @property
    def unit(self) -> str:
        """What margins are measured in."""
        by_logit = all(layer.rule in CHOSEN_BY_LOGIT for layer in self._layers.values())
        return "logits" if by_logit else "choice scores"

    def of(self, decision: Routed) -> Floats:
        """Lowest chosen − highest left out, [T]."""
        layer = self._layers[decision.layer]
        if decision.logits_TE is None:
            raise CannotMeasure(f"{layer.router} does not put out its logits, so margins cannot be read")
        if layer.rule in CHOSEN_BY_LOGIT:
            score_TE = decision.logits_TE.float()
        else:
            score_TE = choice_scores(layer, self._model.get_submodule(layer.router), decision.logits_TE)[1]
        chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool)
        chosen_TE.scatter_(-1, decision.experts_TK.clamp(min=0), value=True)
        lowest_T = score_TE.masked_fill(~chosen_TE, float("inf")).amin(-1)
        highest_T = score_TE.masked_fill(chosen_TE, float("-inf")).amax(-1)
        margin_T: Floats = (lowest_T - highest_T).double().cpu().numpy()
        return np.where(np.isfinite(margin_T), margin_T, np.nan)


@contextmanager
def rounded_routers(loaded: LoadedModel, bits: int) -> Iterator[float]:
    """All routers' weights rounded to nearest, one scale per expert, while the block runs; yields the largest change."""
    scheme = IntegerScheme(bits, None, symmetric=True)
    kept: list[tuple[Any, Tensor]] = []
    largest = 0.0
    try:
        for layer in moe_layers(loaded):
            rows_ED = router_rows(loaded, layer)
            if rows_ED is None:
                raise BadInput(
                    f"{layer.router} has no row of weights per expert to round; choose another model"
                )
            kept.append((rows_ED, rows_ED.detach().clone()))
            rounded_ED = quantize(rows_ED.detach(), scheme).dequantize().to(rows_ED.dtype)
            largest = max(largest, float((rounded_ED - rows_ED).abs().max()))
            rows_ED.data.copy_(rounded_ED)
        yield largest
    finally:
        for rows_ED, own_ED in kept:
            rows_ED.data.copy_(own_ED)


def told_by_margin(margin_T: Floats, flipped_T: Any) -> float:
    """Probability that a flipped token has a smaller margin than a kept one, ties counted half; NaN where all are alike."""
    from scipy.stats import rankdata  # here: the UI process reads this module through the registry

    known_T = ~np.isnan(margin_T)
    margin_T, flipped_T = margin_T[known_T], np.asarray(flipped_T)[known_T]
    n_flipped, n_kept = int(flipped_T.sum()), int((~flipped_T).sum())
    if not n_flipped or not n_kept:
        return float("nan")
    ranks_of_kept = rankdata(margin_T)[~flipped_T].sum()
    return float((ranks_of_kept - n_kept * (n_kept + 1) / 2) / (n_flipped * n_kept))


def layer_table(margin_LT: Floats, flipped_LT: Any, choices: Choices) -> pd.DataFrame:
    """One row per layer: quantiles of the margin, share flipped with interval, and how well the margin told it."""
    flipped = _share_by_group(flipped_LT, choices)
    rows: dict[str, Any] = {"layer": choices.layers}
    for percent in PERCENT:
        rows[f"p{percent}"] = np.nanquantile(margin_LT, percent / 100, axis=1)
    rows |= flipped.columns("flipped_share", high=1.0)
    rows["flips_told"] = [
        told_by_margin(margin_T, flip_T) for margin_T, flip_T in zip(margin_LT, flipped_LT, strict=True)
    ]
    return pd.DataFrame(rows)


def _share_by_group(hit_XT: Any, choices: Choices) -> Counted:
    """Share of tokens [X] with its interval over documents."""
    group_T = choices.group_T
    member_GT = (group_T == np.arange(int(group_T.max()) + 1)[:, None]).astype(np.float64)
    return Counted.share(member_GT @ np.asarray(hit_XT, dtype=np.float64).T, member_GT.sum(1)[:, None])


def _quantiles(margin_LT: Floats, choices: Choices) -> pd.DataFrame:
    """The same quantiles, one row per layer and quantile."""
    values = np.nanquantile(margin_LT, [percent / 100 for percent in PERCENT], axis=1)
    return pd.DataFrame(
        {
            "layer": np.tile(choices.layers, len(PERCENT)),
            "margin": values.ravel(),
            "quantile": np.repeat([f"{percent} %" for percent in PERCENT], len(choices.layers)),
        }
    )


def flip_curve(margin_T: Floats, flipped_T: Any, choices: Choices) -> pd.DataFrame:
    """Tokens in bins of equally many by margin: share flipped, with interval over documents."""
    known_T = ~np.isnan(margin_T)
    edges = np.quantile(margin_T[known_T], np.linspace(0, 1, BINS + 1)[1:-1])
    bin_T = np.searchsorted(edges, margin_T, side="right")
    group_T = choices.group_T
    cell_T = group_T * BINS + bin_T
    n_groups = int(group_T.max()) + 1
    trials_GQ, hits_GQ = (
        np.bincount(cell_T[known_T], weights, minlength=n_groups * BINS).reshape(n_groups, BINS)
        for weights in (None, np.asarray(flipped_T, dtype=np.float64)[known_T])
    )
    low_Q, high_Q = share_ends(hits_GQ, trials_GQ)
    tokens_Q = trials_GQ.sum(0).astype(np.int64)
    means = np.bincount(bin_T[known_T], margin_T[known_T], minlength=BINS)
    some_Q = np.maximum(tokens_Q, 1)
    frame = pd.DataFrame(
        {
            "mean_margin": means / some_Q,
            "flipped_share": hits_GQ.sum(0) / some_Q,
            "low": low_Q,
            "high": high_Q,
            "tokens": tokens_Q,
        }
    )
    return frame[frame["tokens"] > 0].reset_index(drop=True)


def _metrics(
    layers: pd.DataFrame, place: int, margin_LT: Floats, flipped_LT: Any, choices: Choices
) -> tuple[Metric, ...]:
    row = layers.iloc[place]
    return (
        Metric("layer", float(row["layer"]), "layer"),
        Metric("median_margin", float(np.nanmedian(margin_LT[place])), "", n=choices.n_tokens),
        _share_by_group(flipped_LT[place : place + 1], choices)[0].metric(
            "flipped_share", "share", choices, "ratio estimator", better="lower"
        ),
        Metric("flips_told", float(row["flips_told"]), "AUC", n=int(np.asarray(flipped_LT[place]).sum())),
    )


def _views(layer: int, bits: int, unit: str) -> tuple[View, ...]:
    return (
        View(
            "line",
            x="layer",
            y="margin",
            color="quantile",
            frame="quantiles",
            title="Quantiles of the margin by layer",
            unit=unit,
        ),
        View(
            "line",
            x="mean_margin",
            y="flipped_share",
            frame="flips",
            title=f"Layer {layer}: share of decisions that {bits}-bit routers flip, by margin",
            unit="share",
            tooltip=("low", "high", "tokens"),
        ),
        View(
            "table",
            x="layer",
            color="p50",
            frame="layers",
            title="Margins and flips by layer",
            unit=unit,
            tooltip=(
                "p1",
                "p5",
                "p95",
                "flipped_share",
                "flipped_share_low",
                "flipped_share_high",
                "flips_told",
            ),
        ),
    )
