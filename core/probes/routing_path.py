"""Routing path: the experts of every token of a prompt, and one token's way through all layers.

Legend: L MoE layers, T tokens, K slots.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.probes._provenance import provenance
from core.probes._routing_report import chosen_place
from core.probes._tokens import encode, limit_cells
from core.registry import Example, Settings, method
from core.routing import statistics
from core.routing.trace import trace
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.routing.trace import RoutingTrace


class RoutingPathSettings(Settings):
    """Which layer colours the prompt, and whose path is drawn."""

    layer: int = Field(
        -1,
        ge=-1,
        le=1024,
        description="Layer (block index) whose first choice colours the tokens; -1: the last",
    )
    position: int = Field(-1, ge=-1, le=4096, description="Token whose path is drawn; -1: the last")
    positions: int = Field(64, ge=0, le=2048, description="Last positions of the prompt to show; 0 shows all")


@method(
    "probe",
    title="Routing path",
    needs=["moe", "text"],
    paper="https://arxiv.org/abs/2401.04088",
    answers="Which expert does what?",
    examples=(
        Example("Code", Prompt("def add(left, right):\n    return left + right\n\nprint(add(12, 30))\n")),
        Example(
            "Three kinds of text in one prompt",
            Prompt('The library was opened in 1998. {"name": "Anna", "age": 41} SELECT name FROM person;'),
        ),
        Example("Digits, from the first layer on", Prompt("17 + 25 = 42\n8 * 9 = 72\n"), {"layer": 0}),
    ),
)
def routing_path(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: RoutingPathSettings
) -> Result:
    """Follow tokens through the experts: who was chosen first, with which routing weight, layer by layer.

    The chosen experts and their weights are what the experts' module was called with. The first choice is the expert
    of the largest routing weight; slots are sorted by it. Entropy is that of the router's distribution over all
    experts in nats (0: certain, ln E: no preference), the margin is the lowest chosen logit minus the highest one left out.
    Repetition is the share of tokens whose first choice is that of the token before (Mixtral report, table 5); by chance,
    at this layer's own loads, it would be Σ load².
    """
    started = time.perf_counter()
    encoded = encode(loaded, prompt)
    start = encoded.start(settings.positions)
    seen = trace(loaded, encoded.ids, progress)
    limit_cells(len(seen.layers), encoded.n_tokens - start)
    position = encoded.n_tokens - 1 if settings.position < 0 else settings.position
    if position >= encoded.n_tokens:
        raise BadInput(f"position {position} is behind the prompt's last, {encoded.n_tokens - 1}")
    place = chosen_place(settings.layer, seen.layers, len(seen.layers) - 1)
    order_LTK = np.argsort(-seen.weights_LTK, axis=-1, kind="stable")
    experts_LTK = np.take_along_axis(seen.experts_LTK, order_LTK, -1)
    weights_LTK = np.take_along_axis(seen.weights_LTK, order_LTK, -1)
    cells = _cells(seen, experts_LTK, weights_LTK, start)
    layer = seen.layers[place]
    return Result(
        frames={
            "tokens": cells[cells["layer"] == layer].reset_index(drop=True),
            "main": cells,
            "path": _path(seen.layers, experts_LTK[:, position], weights_LTK[:, position]),
            "repetition": repetition(seen.layers, experts_LTK[..., 0], seen.n_experts),
        },
        views=_views(layer, position, seen.texts[position]),
        metrics=_metrics(cells, encoded.n_tokens - start),
        provenance=provenance(
            loaded,
            prompt,
            method="routing_path",
            settings=settings,
            started=started,
            conditions={"tokens": encoded.n_tokens},
            exactness_gap=_unused(experts_LTK),
            exactness_check="share of slots that reached no expert",
        ),
        notes=_notes(seen, start),
    )


def _cells(seen: RoutingTrace, experts_LTK: Any, weights_LTK: Any, start: int) -> pd.DataFrame:
    """One row per layer and shown position."""
    n_shown = len(seen.texts) - start
    shown = slice(start, None)
    first = experts_LTK[:, shown, 0].ravel()
    return pd.DataFrame(
        {
            "layer": np.repeat(seen.layers, n_shown),
            "position": np.tile(np.arange(start, len(seen.texts)), len(seen.layers)),
            "token": np.tile(np.array(seen.texts[shown], dtype=object), len(seen.layers)),
            "expert": first,
            "name": [f"E{expert}" for expert in first],
            "weight": weights_LTK[:, shown, 0].ravel(),
            "experts": [
                ", ".join(f"E{e} {w:.2f}" for e, w in zip(experts, weights, strict=True) if e >= 0)
                for experts, weights in zip(
                    experts_LTK[:, shown].reshape(-1, seen.top_k).tolist(),
                    weights_LTK[:, shown].reshape(-1, seen.top_k).tolist(),
                    strict=True,
                )
            ],
            "entropy_nats": seen.entropy_LT[:, shown].ravel(),
            "margin": seen.margin_LT[:, shown].ravel(),
        }
    )


def _path(layers: tuple[int, ...], experts_LK: Any, weights_LK: Any) -> pd.DataFrame:
    """One row per layer and slot of one token, the heaviest slot first."""
    n_slots = experts_LK.shape[1]
    return pd.DataFrame(
        {
            "layer": np.repeat(layers, n_slots),
            "slot": np.tile(np.arange(1, n_slots + 1), len(layers)),
            "expert": experts_LK.ravel(),
            "name": [f"E{expert}" if expert >= 0 else "none" for expert in experts_LK.ravel()],
            "weight": weights_LK.ravel(),
        }
    )


def repetition(layers: tuple[int, ...], first_LT: Any, n_experts: int) -> pd.DataFrame:
    """Per layer the share of tokens whose first choice is the token before's, and Σ load², what chance would give."""
    rows = []
    for layer, first_T in zip(layers, first_LT, strict=True):
        share_E = statistics.shares(np.bincount(first_T[first_T >= 0], minlength=n_experts))
        rows += [
            (layer, "this prompt", float(statistics.repetition(first_T)) if len(first_T) > 1 else np.nan),
            (layer, "by chance at its loads", float(share_E @ share_E)),
        ]
    return pd.DataFrame(rows, columns=["layer", "series", "repeated_share"])


def _unused(experts_LTK: Any) -> float:
    return float((experts_LTK < 0).mean())


def _metrics(cells: pd.DataFrame, n: int) -> tuple[Metric, ...]:
    return (
        Metric("mean_first_weight", float(cells["weight"].mean()), "weight", n=n),
        Metric("mean_router_entropy", float(cells["entropy_nats"].mean()), "nats", n=n),
        Metric("experts_used", float(cells.groupby("layer")["expert"].nunique().mean()), "experts", n=n),
    )


def _notes(seen: RoutingTrace, start: int) -> tuple[str, ...]:
    notes = [
        f"{seen.n_experts} experts, {seen.top_k} per token.",
        "One prompt shows where its tokens went, not what an expert is for.",
    ]
    if np.isnan(seen.entropy_LT).any():
        notes.append("The router's rule is not known here, so its entropy and margin are not given.")
    elif np.isnan(seen.margin_LT).all():
        notes.append(
            "Logits alone do not decide in this router (it adds a bias or picks groups), so there is no margin."
        )
    if start:
        notes.append(f"The last {len(seen.texts) - start} of {len(seen.texts)} positions are shown.")
    return tuple(notes)


def _views(layer: int, position: int, token: str) -> tuple[View, ...]:
    tooltip = ("token", "experts", "entropy_nats", "margin")
    return (
        View(
            "tokens",
            x="position",
            color="expert",
            text="token",
            frame="tokens",
            title=f"Layer {layer}: first-choice expert of each token",
            nominal=True,
            tooltip=("experts", "entropy_nats", "margin"),
        ),
        View(
            "heatmap",
            x="position",
            y="layer",
            color="weight",
            text="name",
            title="First-choice expert and its routing weight",
            unit="weight",
            tooltip=tooltip,
        ),
        View(
            "heatmap",
            x="position",
            y="layer",
            color="entropy_nats",
            text="name",
            title="How undecided the router was",
            unit="nats",
            tooltip=tooltip,
        ),
        View(
            "heatmap",
            x="slot",
            y="layer",
            color="weight",
            text="name",
            frame="path",
            title=f"Path of token {position} ({token!r}): its experts in every layer, heaviest first",
            unit="weight",
        ),
        View(
            "line",
            x="layer",
            y="repeated_share",
            color="series",
            frame="repetition",
            title="Share of tokens with the same first choice as the token before",
            unit="share",
        ),
    )
