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
from core.probes._routing_report import CONSERVED, conservation_gap, text_flags, text_notes, text_provenance
from core.registry import Example, method
from core.routing.placement import Ints, imbalance, in_order, placement, redundant_counts
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices

SEEN, UNSEEN, PLAIN = "text it was made for", "other documents", "in order, no copies"


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
    means = frame.groupby(["series", "redundant"], sort=False)[["imbalance"]].mean().reset_index()
    return Result(
        frames={"main": means, "layers": frame},
        views=_VIEWS,
        metrics=_metrics(means, choices, counts),
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
    View("heatmap", x="redundant", y="layer", color="unseen", frame="layers", title="On other documents, by layer", tooltip=("imbalance", "in_order")),
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
    """One row per layer, number of copies and series."""
    rows = []
    for at, layer in enumerate(choices.layers):
        plain = imbalance(unseen_LE[at], *in_order(choices.n_experts, n_devices))
        for redundant in counts:
            layout = placement(seen_LE[at], n_devices, redundant)
            unseen = imbalance(unseen_LE[at], *layout)
            for series, value in ((SEEN, imbalance(seen_LE[at], *layout)), (UNSEEN, unseen), (PLAIN, plain)):
                rows.append((layer, redundant, series, value, unseen, plain))
    names = ["layer", "redundant", "series", "imbalance", "unseen", "in_order"]
    return pd.DataFrame(rows, columns=names)


def _metrics(means: pd.DataFrame, choices: Choices, counts: list[int]) -> tuple[Metric, ...]:
    """The plain layout, and the best that copies gave, both on documents the layout was not made for."""
    unseen = means[means["series"] == UNSEEN].set_index("redundant")["imbalance"]
    plain = means[means["series"] == PLAIN]["imbalance"].iloc[0]
    n = choices.n_tokens
    return (
        Metric("imbalance_in_order", float(plain), "×", "lower", n),
        Metric("imbalance_without_copies", float(unseen[counts[0]]), "×", "lower", n),
        Metric("imbalance_with_most_copies", float(unseen[counts[-1]]), "×", "lower", n),
    )
