"""Expert load: how many tokens each expert of each layer gets, and how far that is from an even spread.

Legend: G groups of documents, L MoE layers, E experts, K slots, T tokens.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.probes._routed_text import TextSettings, find_texts, read_choices, text_cost
from core.probes._routing_report import (
    CONSERVED,
    Counted,
    chosen_place,
    conservation_gap,
    count_choices,
    counted_by,
    layer_by_expert,
    melted,
    shown_layers,
    shown_note,
    text_flags,
    text_notes,
    text_provenance,
)
from core.registry import Example, method
from core.routing import statistics
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices
    from core.probes._routing_report import Floats, Ints

BALANCE: dict[str, Any] = {
    "cv": statistics.cv,
    "max_violation": statistics.max_violation,
    "effective_experts": statistics.effective_experts,
    "load_entropy_nats": statistics.entropy,
    "gini": statistics.gini,
}
"""Column → statistic of a layer's loads."""


class ExpertLoadSettings(TextSettings):
    """What text is counted, and whose curve is drawn."""

    layer: int = Field(
        -1, ge=-1, le=1024, description="Layer (block index) whose load curve is drawn; -1: the least even"
    )


@method(
    "probe",
    title="Expert load",
    needs=["moe", "text"],
    paper="https://arxiv.org/abs/2401.04088",
    answers="Which expert does what?",
    examples=(
        Example("All kinds of text", Prompt("(the text is read; the prompt is not)")),
        Example("Python alone", Prompt("(the text is read; the prompt is not)"), {"text": "domain:python"}),
        Example(
            "One prompt alone, which is little",
            Prompt("def add(left, right):\n    return left + right\n"),
            {"text": ""},
        ),
    ),
    cost=text_cost,
)
def expert_load(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertLoadSettings
) -> Result:
    """Count how many tokens each expert gets, layer by layer, and hold it against an even spread.

    The load of expert e in layer l is its share of all choices, count / (T · k); an even spread gives each 1 / E, and the
    map shows load · E, so 1 is even. Per layer: coefficient of variation (standard deviation / mean of the loads),
    maximal violation (max − mean) / mean (Wang et al. 2024, arXiv 2408.15664), entropy of the loads H in nats, effective
    experts exp(H), and Gini. On few tokens even a perfectly even router looks uneven: cv_of_chance =
    √((E − k) / (k · T)) is what it would show, were tokens independent. Intervals are 95 % over documents.
    """
    started = time.perf_counter()
    texts = find_texts(loaded, prompt, settings.text)
    choices = read_choices(loaded, texts, progress, max_tokens=settings.max_tokens)
    load_GLE = count_choices(choices)
    balance = balance_by_layer(load_GLE, choices)
    place = chosen_place(settings.layer, choices.layers, int(balance["cv"].to_numpy().argmax()))
    return Result(
        frames={
            "layers": balance,
            "main": load_map(load_GLE, choices),
            "curve": _curve(load_GLE, place),
            "balance": melted(
                balance,
                ["layer"],
                {"cv": "this text", "cv_of_chance": "even router on as many tokens"},
                "coefficient_of_variation",
            ),
        },
        views=_views(choices.layers[place]),
        metrics=_metrics(load_GLE, choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="expert_load",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=conservation_gap(load_GLE.sum(0), choices),
            exactness_check=CONSERVED,
        ),
        notes=(*text_notes(texts, choices), *shown_note(choices.layers, choices.n_experts)),
        flags=text_flags(choices),
    )


def balance_by_layer(load_GLE: Ints, choices: Choices) -> pd.DataFrame:
    """One row per MoE layer: every statistic of its loads with its interval, and what chance alone would give."""
    columns: dict[str, Any] = {"layer": choices.layers}
    for name, statistic in BALANCE.items():
        columns |= Counted.of(load_GLE, statistic).columns(name)
    n_choices = choices.top_k * choices.n_tokens
    columns["cv_of_chance"] = float(
        statistics.balance_under_chance(n_choices, choices.n_experts, top_k=choices.top_k)
    )
    columns["never_chosen"] = (load_GLE.sum(0) == 0).sum(-1)
    return pd.DataFrame(columns)


def load_map(load_GLE: Ints, choices: Choices) -> pd.DataFrame:
    """One row per shown layer and expert: load in multiples of an even spread, tokens, mean routing weight."""
    n_experts = choices.n_experts
    layers = shown_layers(choices.layers, n_experts)
    places = [choices.layers.index(layer) for layer in layers]
    counts_GSE = load_GLE[:, places]
    tokens_SE = counts_GSE.sum(0)
    share = Counted.share(counts_GSE, counts_GSE.sum(-1, keepdims=True))
    low, high = (share * n_experts).ends()
    zero_T = np.zeros(choices.n_tokens, dtype=np.int64)
    weight_SE = counted_by(choices.experts_LTK[places], zero_T, 1, n_experts, choices.weights_LTK[places])[0]
    with np.errstate(invalid="ignore"):
        mean_weight_SE = weight_SE / tokens_SE  # NaN where no token came
    return pd.DataFrame(
        {
            **layer_by_expert(layers, n_experts),
            "load_over_even": (share.value * n_experts).ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
            "load": share.value.ravel(),
            "tokens": tokens_SE.ravel(),
            "mean_weight": mean_weight_SE.ravel(),
        }
    )


def _curve(load_GLE: Ints, place: int) -> pd.DataFrame:
    """The loads of one layer, the busiest first, with interval and the even spread."""
    counts_GE = load_GLE[:, place]
    share = Counted.share(counts_GE, counts_GE.sum(-1, keepdims=True))
    order_E = np.argsort(-share.value, kind="stable")
    low, high = share.ends(high=1.0)
    lines: dict[str, Floats] = {"load": share.value, "low": low, "high": high}
    frame = pd.DataFrame({name: values[order_E] for name, values in lines.items()})
    frame.insert(0, "expert", order_E)
    frame.insert(0, "rank", np.arange(1, len(order_E) + 1))
    frame["even"] = 1 / len(order_E)
    names = {"load": "load", "low": "95 % low", "high": "95 % high", "even": "even spread"}
    return melted(frame, ["rank", "expert"], names, "load_share").dropna()


def _metrics(load_GLE: Ints, choices: Choices) -> tuple[Metric, ...]:
    def mean_over_layers(statistic: Any) -> Counted:
        return Counted.of(load_GLE, lambda counts: statistic(counts).mean(-1))

    how = "jackknife"
    never = int((load_GLE.sum(0) == 0).sum())
    return (
        mean_over_layers(statistics.cv).metric("load_imbalance", "CV", choices, how, better="lower"),
        mean_over_layers(statistics.max_violation).metric("max_violation", "", choices, how, better="lower"),
        mean_over_layers(statistics.effective_experts).metric(
            "effective_experts", "experts", choices, how, better="higher"
        ),
        Metric("never_chosen", float(never), "experts", "lower", n=choices.n_tokens),
    )


def _views(layer: int) -> tuple[View, ...]:
    tooltip = ("load", "low", "high", "tokens", "mean_weight")
    return (
        View(
            "heatmap",
            x="expert",
            y="layer",
            color="load_over_even",
            title="Load of each expert (1 is an even spread)",
            unit="× even",
            midpoint=1.0,
            tooltip=tooltip,
        ),
        View(
            "heatmap",
            x="expert",
            y="layer",
            color="mean_weight",
            title="Mean routing weight of its tokens",
            unit="weight",
            tooltip=tooltip,
        ),
        View(
            "table",
            x="layer",
            color="cv",
            frame="layers",
            title="Balance by layer",
            tooltip=(
                "cv_low",
                "cv_high",
                "cv_of_chance",
                "max_violation",
                "effective_experts",
                "load_entropy_nats",
                "gini",
                "never_chosen",
            ),
        ),
        View(
            "line",
            x="rank",
            y="load_share",
            color="series",
            frame="curve",
            title=f"Layer {layer}: experts by load",
            unit="share",
            tooltip=("expert",),
        ),
        View(
            "line",
            x="layer",
            y="coefficient_of_variation",
            color="series",
            frame="balance",
            title="Imbalance by layer",
        ),
    )
