"""How many experts do several tokens touch together?

Legend: L MoE layers, E experts, T tokens of a batch.

A batch reads each expert once that any of its tokens chose, so this number is its bytes. Tokens that follow one another
(a prompt's chunk) are alike, tokens of unrelated places (a server's decoding batch) less so; both are measured.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import BadInput
from core.models.fp32_path import fast_fp32
from core.probes._provenance import provenance
from core.probes._routed_text import Choices, TextSettings, find_texts, read_choices, text_cost
from core.registry import Example, method
from core.routing.cache import Ints, uniform_experts_touched
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

DRAWS = 64
"""Batches of each size at most, so that a size costs the same whatever the text's length."""
FOLLOWING, APART = "consecutive tokens", "tokens of random places"


class BatchExpertsSettings(TextSettings):
    """Which batches of which text."""

    largest: int = Field(256, ge=1, le=4096, description="Largest batch, in tokens; sizes are powers of two")
    seed: int = Field(0, ge=0, le=1_000_000, description="Seed of the places that batches are drawn from")


def _cost(anatomy: Anatomy, n_tokens: int, settings: BatchExpertsSettings) -> Cost:
    """Reading the text once; counting is cheap beside it."""
    return text_cost(anatomy, n_tokens, settings)


@method(
    "probe",
    title="Experts per batch",
    needs=["decoder", "text", "moe"],
    answers="What if it routed otherwise?",
    examples=(
        Example("Text of every domain", Prompt("(the text is read instead)")),
        Example("Arithmetic alone", Prompt("(the text is read instead)"), {"text": "domain:arithmetic"}),
    ),
    cost=_cost,
)
def batch_experts(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: BatchExpertsSettings
) -> Result:
    """Count the distinct experts that batches of 1, 2, 4 … tokens touch, beside the formula for uniform routing.

    If every token chose any k of E experts, T tokens would touch E · (1 − (1 − k/E)^T) on average. Below it, tokens
    share experts and a batch is cheaper than the formula says. Shown are means over up to 64 batches per size, and
    their 5 % and 95 % quantiles: the spread over batches, not an error of the mean.
    """
    started = time.perf_counter()
    texts = find_texts(loaded, prompt, settings.text)
    with fast_fp32(n_experts=loaded.anatomy.n_experts) as path:
        choices = read_choices(loaded, texts, progress, max_tokens=settings.max_tokens)
    sizes = _sizes(choices.n_tokens, settings.largest)
    frame = _frame(choices, sizes, np.random.default_rng(settings.seed))
    overall = _overall(frame, choices, sizes)
    return Result(
        frames={"main": overall, "layers": frame},
        views=_VIEWS,
        metrics=_metrics(overall, choices, int(sizes[-1])),
        provenance=provenance(
            loaded,
            prompt,
            method="batch_experts",
            settings=settings,
            started=started,
            conditions={
                "text": texts.name,
                "text_fingerprint": texts.fingerprint,
                "tokens": choices.n_tokens,
                "documents": choices.n_documents,
                "fp32_path": path.name,
            },
            exactness_gap=_gap(frame, choices),
            exactness_check="largest |experts that one token touches − its number of experts|",
        ),
        notes=(f"{choices.n_tokens} tokens of {texts.name}: documents {choices.n_documents}.",),
    )


_VIEWS = (
    View(
        "line",
        x="tokens",
        y="experts",
        color="series",
        title="Distinct experts touched per layer, mean over layers",
        unit="experts",
        tooltip=("share", "p5", "p95"),
    ),
    View(
        "table",
        x="tokens",
        y="experts",
        text="series",
        title="All batch sizes",
        tooltip=("share", "p5", "p95", "of_uniform"),
    ),
    View(
        "heatmap",
        x="tokens",
        y="layer",
        color="experts",
        frame="layers",
        title="Distinct experts by layer: consecutive tokens",
        unit="experts",
        tooltip=("random_places", "uniform", "p5", "p95"),
    ),
)


def _sizes(n_tokens: int, largest: int) -> Ints:
    """1, 2, 4 … up to the largest wanted, or all there are."""
    if n_tokens < 2:
        raise BadInput("one token makes no batch; give longer text")
    most = min(largest, n_tokens)
    return np.unique([*(2**power for power in range(most.bit_length())), most]).astype(np.int64)


def _touched(chosen_TE: NDArray[np.bool_], rows_ST: Ints) -> Ints:
    """Distinct experts of each batch of tokens."""
    counts_S: Ints = chosen_TE[rows_ST].any(1).sum(1)
    return counts_S


def _frame(choices: Choices, sizes: Ints, generator: np.random.Generator) -> pd.DataFrame:
    """One row per layer and size; layers see the same batches."""
    n = choices.n_tokens
    rows = []
    batches = []
    for size in sizes.tolist():
        starts_S = np.unique(np.linspace(0, n - size, DRAWS).astype(np.int64))
        following_ST = starts_S[:, None] + np.arange(size)
        # Runs across the joint of two documents are no run of tokens; where all cross one, they are kept.
        whole_S = choices.document_T[following_ST[:, 0]] == choices.document_T[following_ST[:, -1]]
        apart_ST = np.stack([generator.choice(n, size, replace=False) for _ in range(DRAWS)])
        batches.append((size, following_ST[whole_S] if whole_S.any() else following_ST, apart_ST))
    for at, layer in enumerate(choices.layers):
        chosen_TE = np.zeros((n, choices.n_experts + 1), dtype=bool)
        np.put_along_axis(chosen_TE, choices.experts_LTK[at].astype(np.int64), values=True, axis=1)
        chosen_TE = chosen_TE[:, :-1]  # -1, an empty slot, fell into the last column
        for size, following_ST, apart_ST in batches:
            following_S, apart_S = _touched(chosen_TE, following_ST), _touched(chosen_TE, apart_ST)
            rows.append(
                {
                    "layer": layer,
                    "tokens": size,
                    "experts": float(following_S.mean()),
                    "p5": float(np.quantile(following_S, 0.05)),
                    "p95": float(np.quantile(following_S, 0.95)),
                    "random_places": float(apart_S.mean()),
                    "random_p5": float(np.quantile(apart_S, 0.05)),
                    "random_p95": float(np.quantile(apart_S, 0.95)),
                    "uniform": float(
                        uniform_experts_touched(choices.n_experts, choices.top_k, np.array(size))
                    ),
                }
            )
    return pd.DataFrame(rows)


def _overall(frame: pd.DataFrame, choices: Choices, sizes: Ints) -> pd.DataFrame:
    """Means over layers, long form by series."""
    means = frame.groupby("tokens").mean()
    series = {
        FOLLOWING: ("experts", "p5", "p95"),
        APART: ("random_places", "random_p5", "random_p95"),
        "uniform routing": ("uniform", "uniform", "uniform"),
    }
    parts = [
        pd.DataFrame(
            {
                "series": name,
                "tokens": sizes,
                "experts": means[mean].to_numpy(),
                "share": means[mean].to_numpy() / choices.n_experts,
                "p5": means[low].to_numpy(),
                "p95": means[high].to_numpy(),
                "of_uniform": means[mean].to_numpy() / means["uniform"].to_numpy(),
            }
        )
        for name, (mean, low, high) in series.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _gap(frame: pd.DataFrame, choices: Choices) -> float:
    """One token touches exactly as many experts as it has used slots."""
    alone = frame[frame["tokens"] == 1]
    used_LT = (choices.experts_LTK >= 0).sum(-1)
    if (used_LT == choices.top_k).all():
        return float((alone[["experts", "random_places"]] - choices.top_k).abs().to_numpy().max())
    return float((alone["p95"] - used_LT.max(1)).clip(lower=0).max())


def _metrics(overall: pd.DataFrame, choices: Choices, largest: int) -> tuple[Metric, ...]:
    """Against the formula, at the size where it says half of the experts, and at the largest."""
    half = overall[(overall["series"] == "uniform routing") & (overall["share"] >= 0.5)]["tokens"]
    size = int(half.min()) if len(half) else largest
    share_of = overall[overall["tokens"] == size].set_index("series")["share"].to_dict()
    return (
        Metric("batch", float(size), "tokens", n=choices.n_tokens),
        *(
            Metric(name, float(share_of[series]), "share of experts", "lower", DRAWS)
            for name, series in (
                ("touched_consecutive", FOLLOWING),
                ("touched_random", APART),
                ("touched_uniform", "uniform routing"),
            )
        ),
    )
