"""How evenly would experts load several devices, and what do copies of the busy ones buy?

Legend: L MoE layers, E experts, G devices.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from core.errors import BadInput
from core.probes._routed_text import TextSettings, find_texts, read_choices, text_cost
from core.probes._routing_report import (
    CONSERVED,
    conservation_gap,
    melted,
    text_flags,
    text_notes,
    text_provenance,
)
from core.registry import Example, method
from core.routing.placement import Ints, imbalance, in_order, placement, redundant_counts
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices

SERIES = {
    "seen": "text it was made for",
    "unseen": "other documents",
    "in_order": "in order, no copies: other documents",
}
"""Column → its name in the chart."""


class ExpertPlacementSettings(TextSettings):
    """How many devices, and how many copies may be kept."""

    devices: int = Field(4, ge=1, le=512, description="Devices that share each layer's experts")
    redundant: int = Field(16, ge=0, le=512, description="Copies of experts per layer at most")


@method(
    "probe",
    title="Expert placement",
    needs=["moe", "text"],
    answers="What if it routed otherwise?",
    examples=(
        Example("Four devices", Prompt("The text is read, not this.")),
        Example(
            "Eight devices, Python alone",
            Prompt("The text is read, not this."),
            {"devices": 8, "text": "domain:python"},
        ),
    ),
    cost=text_cost,
)
def expert_placement(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertPlacementSettings
) -> Result:
    """Lay each layer's experts out over devices and measure how much busier the busiest is than the mean.

    A layer waits for its busiest device, so the imbalance max / mean is the factor by which that layer is slower than it
    could be. The layout is EPLB's (DeepSeek 2025): copies for the busiest experts, then greedy packing. It is made from
    the loads of one half of the documents and judged on the other half too, because tomorrow's text is not today's.
    """
    started = time.perf_counter()
    texts = find_texts(loaded, prompt, settings.text)
    choices = read_choices(loaded, texts, progress, max_tokens=settings.max_tokens)
    seen_LE, unseen_LE = _halves(choices)
    counts = redundant_counts(choices.n_experts, settings.devices, most=settings.redundant)
    frame = _frame(choices, seen_LE, unseen_LE, settings.devices, counts)
    means = melted(frame.groupby("redundant").mean().reset_index(), ["redundant"], SERIES, "imbalance")
    return Result(
        frames={"main": means, "layers": frame},
        views=_VIEWS,
        metrics=_metrics(frame, choices),
        provenance=text_provenance(
            loaded,
            prompt,
            method="expert_placement",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=conservation_gap(seen_LE + unseen_LE, choices),
            exactness_check=CONSERVED,
        ),
        notes=(
            *text_notes(texts, choices),
            "Tokens of an expert with copies are taken to be split evenly among them; every device holds as many slots.",
        ),
        flags=text_flags(choices),
    )


_VIEWS = (
    View("line", x="redundant", y="imbalance", color="series", title="Busiest device over the mean, mean of layers"),
    View("heatmap", x="redundant", y="layer", color="unseen", frame="layers", title="On other documents, by layer", tooltip=("seen", "in_order")),
)  # fmt: skip


def _halves(choices: Choices) -> tuple[Ints, Ints]:
    """Loads [L, E] over every other document, and over the rest."""
    odd_T = choices.document_T % 2 == 1
    if odd_T.all() or not odd_T.any():
        raise BadInput(
            "one document has no other half to judge a layout on; name a text of several documents"
        )
    return _loads(choices, ~odd_T), _loads(choices, odd_T)


def _loads(choices: Choices, tokens_T: np.ndarray) -> Ints:
    chosen = choices.experts_LTK[:, tokens_T].astype(np.int64)
    rows = [np.bincount(layer[layer >= 0], minlength=choices.n_experts) for layer in chosen]
    return np.stack(rows)


def _frame(
    choices: Choices, seen_LE: Ints, unseen_LE: Ints, n_devices: int, counts: list[int]
) -> pd.DataFrame:
    """One row per layer and number of copies: the imbalance on the text of the layout, on other text, and without it."""
    rows = []
    for at, layer in enumerate(choices.layers):
        plain = imbalance(unseen_LE[at], *in_order(choices.n_experts, n_devices))
        for redundant in counts:
            layout = placement(seen_LE[at], n_devices, redundant)
            rows.append(
                {
                    "layer": layer,
                    "redundant": redundant,
                    "seen": imbalance(seen_LE[at], *layout),
                    "unseen": imbalance(unseen_LE[at], *layout),
                    "in_order": plain,
                }
            )
    return pd.DataFrame(rows)


def _metrics(frame: pd.DataFrame, choices: Choices) -> tuple[Metric, ...]:
    """The plain layout, and the best that copies gave, both on documents the layout was not made for."""
    mean = frame.groupby("redundant")[["unseen", "in_order"]].mean()
    return (
        Metric("imbalance_in_order", float(mean["in_order"].iloc[0]), "×", "lower", choices.n_tokens),
        Metric("imbalance_without_copies", float(mean["unseen"].iloc[0]), "×", "lower", choices.n_tokens),
        Metric("imbalance_with_most_copies", float(mean["unseen"].iloc[-1]), "×", "lower", choices.n_tokens),
    )
