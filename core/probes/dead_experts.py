"""Dead experts: how many experts a text never reaches, against how long it is.

Legend: L MoE layers, E experts, K slots, T tokens, N documents, O orders of the documents, P points of the curve.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field

from core.evaluate._intervals import wilson
from core.probes._routed_text import TextSettings, find_texts, read_choices, text_cost
from core.probes._routing_report import (
    CONSERVED,
    conservation_gap,
    count_choices,
    layer_by_expert,
    shown_note,
    shown_rows,
    text_flags,
    text_notes,
    text_provenance,
)
from core.registry import Example, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel
    from core.probes._routed_text import Choices
    from core.probes._routing_report import Ints

POINTS = 40
MEAN = "this text, mean of orders"
FEW_TOKENS = 100
"""About five short prompts: the headline says how many experts so little text would call dead."""


class DeadExpertsSettings(TextSettings):
    """On what text, and in how many orders."""

    orders: int = Field(
        100,
        ge=20,
        le=1000,
        description="Random orders of the documents that the curve and its band are made of",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the orders")


@method(
    "probe",
    title="Dead experts",
    needs=["moe", "text"],
    paper="https://arxiv.org/abs/2101.03961",
    answers="Which expert does what?",
    examples=(
        Example("All kinds of text", Prompt("(the text is read; the prompt is not)")),
        Example(
            "One kind of text reaches fewer",
            Prompt("(the text is read; the prompt is not)"),
            {"text": "domain:arithmetic"},
        ),
    ),
    cost=text_cost,
)
def dead_experts(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: DeadExpertsSettings
) -> Result:
    """Ask how many experts were never chosen, and whether the text was long enough to say so.

    The curve gives the share of experts not chosen within the first n tokens, averaged over random orders of the documents; the
    band holds 95 % of the orders. Beside it what a perfectly even router would leave out, (1 − k / E)ⁿ. Only where
    the curve has become flat does never chosen mean dead; five prompts are at its steep beginning. An expert that none
    of N documents reached may still be reached by up to 1 − 0.05^(1 / N), about 3 / N, of all documents (95 %, one-sided).
    """
    started = time.perf_counter()
    texts = find_texts(loaded, prompt, settings.text)
    choices = read_choices(loaded, texts, progress, max_tokens=settings.max_tokens)
    load_LE = count_choices(choices).sum(0)
    curve = dead_curve(choices, orders=settings.orders, seed=settings.seed)
    cells = _cells(choices, load_LE)
    return Result(
        frames={
            "curve": pd.concat([curve, _even(choices, curve["tokens"].unique())], ignore_index=True),
            "rare": cells.sort_values(["tokens", "layer", "expert"], ignore_index=True).head(100),
            "main": shown_rows(cells, choices.layers, choices.n_experts),
            "layers": _layers(choices, load_LE),
        },
        views=_VIEWS,
        metrics=_metrics(choices, load_LE, curve),
        provenance=text_provenance(
            loaded,
            prompt,
            method="dead_experts",
            settings=settings,
            started=started,
            texts=texts,
            choices=choices,
            exactness_gap=conservation_gap(load_LE, choices),
            exactness_check=CONSERVED,
        ),
        notes=(*text_notes(texts, choices), *shown_note(choices.layers, choices.n_experts)),
        flags=text_flags(choices),
    )


def dead_curve(choices: Choices, *, orders: int, seed: int) -> pd.DataFrame:
    """Share of all experts not chosen within n tokens: mean over orders of the documents, and their 95 % band."""
    generator = np.random.default_rng(seed)
    n_documents = choices.n_documents
    points_P = np.unique(np.geomspace(1, choices.n_tokens, POINTS).round().astype(np.int64))
    missing_OP = np.empty((orders, len(points_P)))
    per_document_NLE = _first_of_documents(choices)
    length_N = np.bincount(np.unique(choices.document_T, return_inverse=True)[1], minlength=n_documents)
    for row in range(orders):
        order_N = generator.permutation(n_documents)
        before_N = np.empty(n_documents, dtype=np.int64)
        before_N[order_N] = np.cumsum(length_N[order_N]) - length_N[order_N]
        first_X = (per_document_NLE + before_N[:, None]).min(0)
        missing_OP[row] = 1 - np.searchsorted(np.sort(first_X), points_P, side="right") / len(first_X)
    low_P, high_P = np.quantile(missing_OP, [0.025, 0.975], axis=0)
    return pd.DataFrame(
        {
            "tokens": np.tile(points_P, 3),
            "never_chosen_share": np.concatenate([missing_OP.mean(0), low_P, high_P]),
            "series": np.repeat([MEAN, "95 % of orders, low", "95 % of orders, high"], len(points_P)),
        }
    )


def _first_of_documents(choices: Choices) -> Ints:
    """Token number within each document, from 1, at which each expert is first chosen: [N, L · E]; huge where never."""
    _, document_T = np.unique(choices.document_T, return_inverse=True)
    n_documents, never = int(document_T.max()) + 1, np.iinfo(np.int64).max // 2
    starts_T = np.argsort(document_T, kind="stable")
    begins_N = np.searchsorted(document_T[starts_T], np.arange(n_documents))
    number_T = np.empty(len(document_T), dtype=np.int64)
    number_T[starts_T] = np.arange(len(document_T)) - begins_N[document_T[starts_T]] + 1
    shape = (n_documents, len(choices.layers), choices.n_experts + 1)
    first_NLE = np.full(shape, never, dtype=np.int64)
    for place, chosen_TK in enumerate(choices.experts_LTK):
        np.minimum.at(first_NLE[:, place], (document_T[:, None], chosen_TK), number_T[:, None])
    return first_NLE[..., :-1].reshape(n_documents, -1)


def _even(choices: Choices, points_P: Any) -> pd.DataFrame:
    """What a router that chose k of E at random for every token would leave out."""
    missed_P = (1 - choices.top_k / choices.n_experts) ** np.asarray(points_P, dtype=np.float64)
    return pd.DataFrame({"tokens": points_P, "never_chosen_share": missed_P, "series": "even router"})


def _cells(choices: Choices, load_LE: Ints) -> pd.DataFrame:
    """One row per layer and expert: tokens and documents that reached it, and the share of documents that still may."""
    _, document_T = np.unique(choices.document_T, return_inverse=True)
    reached_LE = (_first_of_documents(choices) < len(document_T) + 1).sum(0)
    n_documents = choices.n_documents
    frame = pd.DataFrame(
        {
            **layer_by_expert(choices.layers, choices.n_experts),
            "tokens": load_LE.ravel(),
            "documents": reached_LE,
            "document_share": reached_LE / n_documents,
        }
    )
    frame.insert(0, "name", [f"L{a} E{b}" for a, b in zip(frame["layer"], frame["expert"], strict=True)])
    low, high = zip(*(wilson(int(hits), n_documents) for hits in reached_LE), strict=True)
    frame["low"], frame["high"] = low, high
    never = frame["documents"] == 0
    frame.loc[never, "high"] = 1 - 0.05 ** (1 / n_documents)
    frame["log_tokens"] = np.log10(1 + frame["tokens"])
    return frame


def _layers(choices: Choices, load_LE: Ints) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": choices.layers,
            "never_chosen": (load_LE == 0).sum(-1),
            "fewest_tokens": load_LE.min(-1),
            "even_tokens": choices.n_tokens * choices.top_k / choices.n_experts,
        }
    )


def _metrics(choices: Choices, load_LE: Ints, curve: pd.DataFrame) -> tuple[Metric, ...]:
    mean = curve[curve["series"] == MEAN]
    few = int(min(FEW_TOKENS, choices.n_tokens))
    log_tokens = np.log(mean["tokens"].to_numpy(dtype=np.float64))
    early = float(np.interp(np.log(few), log_tokens, mean["never_chosen_share"]))
    half = float(np.interp(np.log(choices.n_tokens / 2), log_tokens, mean["never_chosen_share"]))
    dead = int((load_LE == 0).sum())
    return (
        Metric("never_chosen", float(dead), "experts", "lower", n=choices.n_tokens),
        Metric("never_chosen_share", dead / load_LE.size, "share", "lower", n=choices.n_tokens),
        Metric("within_half_the_text", half, "share", n=choices.n_tokens // 2),
        Metric(f"within_{few}_tokens", early, "share", n=few),
    )


_VIEWS = (
    View(
        "line",
        x="tokens",
        y="never_chosen_share",
        color="series",
        frame="curve",
        title="Share of experts not chosen yet, against tokens read",
        unit="share",
    ),
    View(
        "heatmap",
        x="expert",
        y="layer",
        color="log_tokens",
        title="Tokens that reached each expert (log₁₀(1 + tokens))",
        tooltip=("tokens", "documents", "document_share", "low", "high"),
    ),
    View(
        "table",
        x="name",
        color="tokens",
        frame="rare",
        title="Rarest experts",
        tooltip=("documents", "document_share", "low", "high"),
    ),
    View(
        "table",
        x="layer",
        color="never_chosen",
        frame="layers",
        title="By layer",
        tooltip=("fewest_tokens", "even_tokens"),
    ),
)
