"""Expert similarity: how alike a layer's experts are in their weights, in what they put out, and in what calls them.

Legend: E experts, T tokens, D d_model, G groups of documents.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.lazy import torch
from core.models.experts import expert_output
from core.probes._routed_text import TextSettings, choices_of, find_texts, readings, text_cost
from core.probes._routing_report import (
    Counted,
    busiest,
    busiest_note,
    chosen_place,
    count_choices,
    pair_columns,
    router_rows,
    text_notes,
    text_provenance,
)
from core.registry import Example, method
from core.routing.discover import moe_layers
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices, Reading
    from core.probes._routing_report import Floats
    from core.routing.discover import MoeLayer
    from core.routing.lens import Routed

RANKED = 100
OUTPUT_BYTES = 128 << 20
"""All experts' outputs on so many tokens are held at a time."""
WEIGHT_COLUMNS = 1 << 16
"""Weights of each expert that are multiplied at a time, in float64."""
ALIKE = 0.9
"""Cosine of outputs from which two experts count as near duplicates."""


class ExpertSimilaritySettings(TextSettings):
    """Which layer, and on what text its experts are run."""

    layer: int = Field(
        -1, ge=-1, le=1024, description="Layer (block index) whose experts are compared; -1: the middle one"
    )
    max_tokens: int = Field(
        1024,
        ge=64,
        le=16_384,
        description="Tokens that all experts of the layer are run on, whoever was chosen",
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: ExpertSimilaritySettings) -> Cost:
    """The text once, and every expert of one layer on every token."""
    once = text_cost(anatomy, n_tokens, settings)
    layers = max(1, sum(block.is_moe for block in anatomy.blocks))
    per_layer = anatomy.n_experts / (layers * max(1, anatomy.experts_per_token))
    return Cost(once.forwards * (1 + per_layer), once.extra_bytes + 3 * OUTPUT_BYTES)


@method(
    "probe",
    title="Expert similarity",
    needs=["moe", "text"],
    paper="https://arxiv.org/abs/2406.18219",
    answers="Which expert does what?",
    examples=(
        Example(
            "Which experts of the middle layer are alike?", Prompt("(the text is read; the prompt is not)")
        ),
        Example("And of the first?", Prompt("(the text is read; the prompt is not)"), {"layer": 0}),
    ),
    cost=_cost,
)
def expert_similarity(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertSimilaritySettings
) -> Result:
    """Compare the experts of a layer pair by pair, in three ways, by cosine.

    Outputs: mean over tokens of cos(f_i(x), f_j(x)), every expert run on every token, chosen or not (as in REAM,
    arXiv 2604.04356), with a 95 % interval over documents. Weights: cosine of all their parameters as one vector; the
    order of an expert's neurons is arbitrary, so alike experts may have it near 0, and only copies are sure to have 1. Router
    rows: cosine of what calls them. Two experts that put out the same and are called by the same are one too many.
    """
    started = time.perf_counter()
    texts = find_texts(loaded, prompt, settings.text)
    layers = moe_layers(loaded)
    place = chosen_place(settings.layer, [layer.layer for layer in layers], len(layers) // 2)
    layer = layers[place]
    if layer.n_experts < 2:
        raise BadInput(f"layer {layer.layer} has one expert, so there is no pair to compare")

    def keep(decision: Routed) -> Any:
        return decision.hidden_TD.clone() if decision.layer == layer.layer else None

    found = list(readings(loaded, texts, progress, max_tokens=settings.max_tokens, keep=keep))
    choices = choices_of(loaded, found)
    with loaded.lock, torch.inference_mode():
        outputs, gap = _outputs(loaded, layer, place, found, choices)
        weights_EE = weight_cosines(loaded, layer)
        router_EE = row_cosines(loaded, layer)
    shown_E = busiest(count_choices(choices).sum(0)[place])
    cells = _map(outputs, weights_EE, router_EE, shown_E)
    ranked = _pairs(outputs, weights_EE, router_EE)
    return Result(
        frames={"ranked": ranked.head(RANKED), "main": cells, "layers": _routers(loaded, layers)},
        views=_views(layer.layer),
        metrics=_metrics(ranked, choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="expert_similarity",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=gap,
            exactness_check="largest |Σ weight · f_e(x) − what the experts' module gives| as a share of its largest value",
        ),
        notes=(
            *text_notes(texts, choices),
            f"Unrelated vectors of {loaded.anatomy.d_model} numbers have a cosine of 0 ± {loaded.anatomy.d_model**-0.5:.2g}.",
            *busiest_note(shown_E, layer.n_experts),
        ),
    )


def _outputs(
    loaded: LoadedModel, layer: MoeLayer, place: int, found: list[Reading], choices: Choices
) -> tuple[Counted, float | None]:
    """Mean cosine of every pair's outputs [E, E], and how far our outputs are from adding up to the module's."""
    experts = loaded.model.get_submodule(layer.experts)
    hidden_TD = torch.cat([one.kept[place] for one in found])
    n, n_experts = len(hidden_TD), layer.n_experts
    at_once = max(1, OUTPUT_BYTES // (4 * n_experts * hidden_TD.shape[1]))
    group_T = torch.from_numpy(choices.group_T).to(hidden_TD.device)
    n_groups = int(group_T.max()) + 1
    sums_GEE = torch.zeros(n_groups, n_experts, n_experts, dtype=torch.float64, device=hidden_TD.device)
    gap = None
    for start in range(0, n, at_once):
        span = slice(start, start + at_once)
        outputs_TED = torch.stack(
            [expert_output(experts, e, hidden_TD[span]) for e in range(n_experts)], dim=1
        )
        if start == 0 and not layer.shim:
            gap = _gap(experts, hidden_TD[span], outputs_TED, choices, place)
        unit_TED = torch.nn.functional.normalize(outputs_TED.float(), dim=-1)
        sums_GEE.index_add_(0, group_T[span], (unit_TED @ unit_TED.mT).double())
    counts_G = np.bincount(choices.group_T)[:, None, None]
    return Counted.share(sums_GEE.cpu().numpy(), counts_G), gap


def _gap(experts: Any, hidden_TD: Tensor, outputs_TED: Tensor, choices: Choices, place: int) -> float:
    """Our outputs, weighted as the router did, against the module's own sum."""
    n = len(hidden_TD)
    experts_TK = torch.from_numpy(choices.experts_LTK[place, :n].astype(np.int64)).to(hidden_TD.device)
    weights_TK = torch.from_numpy(choices.weights_LTK[place, :n]).to(hidden_TD)
    module_TD = experts(hidden_TD, experts_TK.clamp(min=0), weights_TK)
    picked_TKD = outputs_TED[torch.arange(n, device=hidden_TD.device)[:, None], experts_TK.clamp(min=0)]
    ours_TD = (picked_TKD * weights_TK[..., None]).sum(1)
    return float((ours_TD - module_TD).abs().max() / module_TD.abs().max())


def _cosines(rows_EX: Tensor) -> Floats:
    unit_EX = torch.nn.functional.normalize(rows_EX.double(), dim=-1)
    cosine_EE: Floats = (unit_EX @ unit_EX.T).cpu().numpy()
    return cosine_EE


def weight_cosines(loaded: LoadedModel, layer: MoeLayer) -> Floats:
    """Cosine [E, E] of all parameters of two experts."""
    own = loaded.model.get_submodule(layer.experts).parameters()
    dots_EE = torch.zeros(layer.n_experts, layer.n_experts, dtype=torch.float64, device=loaded.model.device)
    for parameter in own:
        if len(parameter) == layer.n_experts:
            for part in parameter.detach().reshape(layer.n_experts, -1).split(WEIGHT_COLUMNS, dim=1):
                dots_EE += part.double() @ part.double().T
    size_E = dots_EE.diagonal().sqrt()
    cosine_EE: Floats = (dots_EE / (size_E[:, None] * size_E)).cpu().numpy()
    return cosine_EE


def row_cosines(loaded: LoadedModel, layer: MoeLayer) -> Floats:
    """Cosine [E, E] of two experts' router rows; NaN for a router without rows."""
    rows_ED = router_rows(loaded, layer)
    return np.full((layer.n_experts,) * 2, np.nan) if rows_ED is None else _cosines(rows_ED.detach())


def _map(outputs: Counted, weights_EE: Floats, router_EE: Floats, shown_E: Any) -> pd.DataFrame:
    """One row per ordered pair of shown experts; an expert with itself is left empty."""
    row, column = pair_columns(shown_E)
    maps = {"outputs": outputs.value, "weights": weights_EE, "router_rows": router_EE}
    other = row != column
    return pd.DataFrame(
        {
            "expert": row,
            "other": column,
            **{name: np.where(other, cosine_EE[row, column], np.nan) for name, cosine_EE in maps.items()},
        }
    )


def _pairs(outputs: Counted, weights_EE: Floats, router_EE: Floats) -> pd.DataFrame:
    """Every pair once, those with the most alike outputs first."""
    first, second = np.triu_indices(len(weights_EE), 1)
    below, above = outputs[first, second].ends(low=-1.0, high=1.0)
    return pd.DataFrame(
        {
            "pair": [f"E{i} + E{j}" for i, j in zip(first, second, strict=True)],
            "expert": first,
            "other": second,
            "outputs": outputs.value[first, second],
            "low": below,
            "high": above,
            "weights": weights_EE[first, second],
            "router_rows": router_EE[first, second],
        }
    ).sort_values("outputs", ascending=False, ignore_index=True)


def _routers(loaded: LoadedModel, layers: tuple[MoeLayer, ...]) -> pd.DataFrame:
    """Per layer how alike its router rows are: mean and largest cosine of a pair."""
    rows = []
    for layer in layers:
        pair = row_cosines(loaded, layer)[np.triu_indices(layer.n_experts, 1)]
        rows += [
            (layer.layer, "mean pair", float(pair.mean())),
            (layer.layer, "most alike pair", float(pair.max())),
        ]
    return pd.DataFrame(rows, columns=["layer", "series", "cosine"])


def _metrics(ranked: pd.DataFrame, choices: Choices) -> tuple[Metric, ...]:
    best = ranked.iloc[0]
    known = np.isfinite(best["low"])
    return (
        Metric(
            "most_alike_outputs",
            float(best["outputs"]),
            "cosine",
            n=choices.n_tokens,
            low=float(best["low"]) if known else None,
            high=float(best["high"]) if known else None,
            interval="ratio estimator over documents; the best of all pairs, so a little high"
            if known
            else "",
        ),
        Metric("mean_outputs", float(ranked["outputs"].mean()), "cosine", n=len(ranked)),
        Metric("mean_weights", float(ranked["weights"].mean()), "cosine", n=len(ranked)),
        Metric("near_duplicates", float((ranked["outputs"] >= ALIKE).sum()), "pairs", n=len(ranked)),
    )


def _views(layer: int) -> tuple[View, ...]:
    all_three = ("outputs", "weights", "router_rows")
    titles = ("outputs, mean over tokens", "weights, as one vector", "router rows")
    return (
        View(
            "table",
            x="pair",
            color="outputs",
            frame="ranked",
            title=f"Layer {layer}: experts by how alike their outputs are",
            unit="cosine",
            tooltip=("low", "high", "weights", "router_rows"),
        ),
        *(
            View(
                "heatmap",
                x="other",
                y="expert",
                color=color,
                title=f"Layer {layer}: cosine of {title}",
                unit="cosine",
                midpoint=0.0,
                tooltip=all_three,
            )
            for color, title in zip(all_three, titles, strict=True)
        ),
        View(
            "line",
            x="layer",
            y="cosine",
            color="series",
            frame="layers",
            title="How alike router rows are, by layer",
            unit="cosine",
        ),
    )
