"""Expert flow: from the experts of one layer to those of the next, token by token.

Legend: G groups of documents, L MoE layers, T tokens, K slots, E experts.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.probes._routed_text import TextSettings, find_texts, read_choices, text_cost
from core.probes._routing_report import (
    Counted,
    chosen_place,
    melted,
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
    from core.probes._routing_report import Floats

EDGES = 400
"""Edges of a flow that a reader may be shown; they are the heaviest."""
SHUFFLES = 5


class ExpertFlowSettings(TextSettings):
    """Between which layers, counted how, on what text."""

    layer: int = Field(
        -1,
        ge=-1,
        le=1024,
        description="Layer (block index) the flow starts at; it ends at the next MoE layer; -1: where the next expert is "
        "easiest to tell",
    )
    weighting: Literal["count", "weight"] = Field(
        "count",
        description="count: every pair of a token's experts here and there counts 1; weight: the root of the product of "
        "their routing weights",
    )
    edges: int = Field(60, ge=1, le=EDGES, description="Heaviest edges that are drawn")


@method(
    "probe",
    title="Expert flow",
    needs=["moe", "text"],
    paper="https://arxiv.org/abs/2409.02060",
    answers="Which expert does what?",
    examples=(
        Example("All kinds of text", Prompt("(the text is read; the prompt is not)")),
        Example(
            "From the first layer on, by routing weight",
            Prompt("(the text is read; the prompt is not)"),
            {"layer": 0, "weighting": "weight"},
        ),
    ),
    cost=text_cost,
)
def expert_flow(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertFlowSettings
) -> Result:
    """Follow tokens from their experts in one layer to their experts in the next.

    Every token counts for all k · k pairs of an expert here and an expert there, not for pairs of equal rank alone, so counts
    sum to T · k²; by weight a pair counts √(w_i · w_j). P(j | i) is the share of expert i's flow that goes to j, with a
    95 % interval over documents; lift is that over j's share of all flow, 1 where the one layer says nothing of
    the next. Normalised mutual information of the two first choices sums this up per pair of layers; its control shuffles
    the tokens of one layer.
    """
    started = time.perf_counter()
    texts = find_texts(loaded, prompt, settings.text)
    choices = read_choices(loaded, texts, progress, max_tokens=settings.max_tokens)
    if len(choices.layers) < 2:
        raise BadInput(f"{loaded.ref} has one MoE layer, so there is no next one to flow to")
    layers = _predictability(choices)
    best = int((layers["nmi"] - layers["nmi_shuffled"]).to_numpy().argmax())
    place = min(chosen_place(settings.layer, choices.layers, best), len(choices.layers) - 2)
    flow_GEE = flow_by_group(choices, place, weighted=settings.weighting == "weight")
    edges = edge_table(flow_GEE, choices.layers[place : place + 2])
    shares = {"nmi": "next layer", "nmi_shuffled": "shuffled tokens"}
    return Result(
        frames={
            "main": edges.head(settings.edges),
            "layers": layers,
            "information": melted(layers, ["layer"], shares, "information"),
        },
        views=_views(choices.layers[place], choices.layers[place + 1]),
        metrics=_metrics(layers, place, edges, settings.edges, choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="expert_flow",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=_gap(flow_by_group(choices, place, weighted=False), choices),
            exactness_check="|Σ counts − tokens × k²| as a share of tokens × k²",
        ),
        notes=text_notes(texts, choices),
        flags=text_flags(choices),
    )


def flow_by_group(choices: Choices, place: int, *, weighted: bool) -> Floats:
    """Flow from every expert of one MoE layer to every expert of the next, by group of documents: [G, E, E]."""
    values_LTK = np.sqrt(choices.weights_LTK) if weighted else np.ones_like(choices.weights_LTK)
    here_TE, there_TE = (
        statistics.dense_weights(choices.experts_LTK[at], values_LTK[at], choices.n_experts)
        for at in (place, place + 1)
    )
    group_T = choices.group_T
    groups = (group_T == group for group in range(int(group_T.max()) + 1))
    return np.stack([(here_TE[rows_T].T @ there_TE[rows_T]).astype(np.float64) for rows_T in groups])


def edge_table(flow_GEE: Floats, layers: tuple[int, ...]) -> pd.DataFrame:
    """Every edge that any token took, the heaviest first: its weight, P(j | i) with interval, and lift."""
    total_EE = flow_GEE.sum(0)
    source, target = np.nonzero(total_EE > 0)
    given = Counted.share(flow_GEE, flow_GEE.sum(-1, keepdims=True))[source, target]
    of_all_E = total_EE.sum(0) / total_EE.sum()
    frame = pd.DataFrame(
        {
            "source": [f"L{layers[0]} E{expert}" for expert in source],
            "target": [f"L{layers[1]} E{expert}" for expert in target],
            "weight": total_EE[source, target],
            **given.columns("p_target", high=1.0),
            "lift": given.value / of_all_E[target],
        }
    )
    return frame.sort_values("weight", ascending=False, kind="stable", ignore_index=True)


def _predictability(choices: Choices) -> pd.DataFrame:
    """Per MoE layer but the last: what its first choice tells of the next layer's, and what shuffled tokens tell."""
    first_LT = choices.first_LT
    generator = np.random.default_rng(0)

    def told(here_T: np.ndarray, there_T: np.ndarray) -> float:
        n = choices.n_experts
        used_T = (here_T >= 0) & (there_T >= 0)
        pair_T = here_T[used_T].astype(np.int64) * n + there_T[used_T]
        counts_EE = np.bincount(pair_T, minlength=n * n).reshape(n, n)
        return float(statistics.normalized_mutual_information(counts_EE))

    rows = []
    for place, layer in enumerate(choices.layers[:-1]):
        here_T, there_T = first_LT[place], first_LT[place + 1]
        shuffled = [told(here_T, generator.permutation(there_T)) for _ in range(SHUFFLES)]
        rows.append(
            {
                "layer": layer,
                "next_layer": choices.layers[place + 1],
                "nmi": told(here_T, there_T),
                "nmi_shuffled": float(np.mean(shuffled)),
                "same_number": float((here_T == there_T).mean()),
            }
        )
    return pd.DataFrame(rows)


def _gap(counts_GEE: Floats, choices: Choices) -> float:
    due = choices.n_tokens * choices.top_k**2
    return abs(float(counts_GEE.sum()) - due) / due


def _metrics(
    layers: pd.DataFrame, place: int, edges: pd.DataFrame, n_shown: int, choices: Choices
) -> tuple[Metric, ...]:
    row = layers.iloc[place]
    n = choices.n_tokens
    shown = edges.head(n_shown)
    return (
        Metric("layer", float(row["layer"]), "layer"),
        Metric("information_at_layer", float(row["nmi"]), "NMI", n=n),
        Metric("shuffled_at_layer", float(row["nmi_shuffled"]), "NMI", n=n),
        Metric("flow_shown", float(shown["weight"].sum() / edges["weight"].sum()), "share", n=len(shown)),
    )


def _views(layer: int, following: int) -> tuple[View, ...]:
    tooltip = ("p_target", "p_target_low", "p_target_high", "lift")
    title = f"From layer {layer} to layer {following}"
    return (
        View("flow", x="source", y="target", color="weight", title=title, tooltip=tooltip),
        View(
            "table",
            x="source",
            color="weight",
            text="target",
            title=f"{title}: heaviest edges",
            tooltip=tooltip,
        ),
        View(
            "line",
            x="layer",
            y="information",
            color="series",
            frame="information",
            title="What a layer's first choice tells of the next layer's",
        ),
        View(
            "table",
            x="layer",
            color="nmi",
            frame="layers",
            title="Pairs of layers",
            tooltip=("next_layer", "nmi_shuffled", "same_number"),
        ),
    )
