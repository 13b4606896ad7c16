"""Sentence similarity of a variant against its base on pairs that people scored: Spearman, Pearson, and how far it moved.

Knows vectors and scores. How an encoder makes a sentence vector is ``core.models.embed``'s knowledge, which pairs may be
measured on is ``core.corpus``'. Legend: N pairs.
"""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
from pydantic import Field

from core.corpus.learned import never_learned
from core.corpus.rows import Rows
from core.errors import BadInput
from core.evaluate._comparison import provenance
from core.evaluate._correlation import correlation_metrics, pearson, spearman
from core.evaluate._intervals import Bootstrap, Floats, Interval
from core.evaluate._vectors import SIMILARITIES, Vectors, cosines, pair_frame
from core.journal import Journal
from core.models.fp32_path import Fp32Setting, fast_fp32
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.types import Metric, Progress, Result, content_hash

FEWEST = 10
"""Fewer pairs give a rank correlation that means nothing."""
PROTOCOL_TEXT = (
    "Both texts of a pair are embedded by both models (pooled and normalised as the checkpoint says), each cut at "
    "max_tokens; pairs that either model learned from are no part. Spearman and Pearson: correlation of people's scores "
    "with the cosine of the two vectors. Cosine agreement: mean cosine of the two models' vectors of a text, both texts of "
    "every pair. Intervals: 95 %, pairs resampled, both models on the same draws."
)
PROTOCOL = f"sentence similarity, version 1 ({content_hash(PROTOCOL_TEXT)[:8]})"


class SentenceSimilaritySettings(Settings):
    """How many pairs, and how much of each text."""

    max_pairs: int = Field(5000, ge=FEWEST, le=1_000_000, description="Pairs used, the first of the rows")
    max_tokens: int = Field(128, ge=4, le=131_072, description="Tokens after which a text is cut")
    bootstrap_draws: int = Field(
        2000, ge=500, le=100_000, description="Resamplings of pairs for the intervals"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the resampling")
    fp32_path: Fp32Setting = Field(
        "auto", description="Kernels of float32 products: auto takes oneDNN's where proven equal, exact never"
    )


@method(
    "evaluate",
    title="Sentence similarity",
    needs=("encoder", "text"),
    paper="Cer et al., SemEval-2017 Task 1: Semantic Textual Similarity, arXiv:1708.00055",
)
def run(
    base: LoadedModel,
    variant: LoadedModel,
    rows: Rows,
    journal: Journal,
    progress: Progress,
    settings: SentenceSimilaritySettings,
) -> Result:
    """Whether a variant still ranks pairs of texts by similarity as people do.

    Spearman's rank correlation and Pearson's linear one between people's scores and the cosine of a pair's two vectors,
    for variant and base, and their difference resampled in pairs; and, where vectors are
    equally long, the mean cosine of both models' vectors of the same text. Pairs that a model learned from are never measured on. Every pair's similarity is kept for comparison.
    """
    began = time.perf_counter()
    rows = never_learned(rows, (base, variant))
    rows = rows.take(range(min(len(rows), settings.max_pairs)), named=rows.name)
    gold_N = np.array([row.score for row in rows.rows])
    if len(gold_N) < FEWEST or len(set(gold_N)) < 2:
        raise BadInput(
            f"{rows.name} has {len(gold_N)} pairs with {len(set(gold_N))} different scores; a correlation needs at least "
            f"{FEWEST} pairs that are not all alike"
        )
    firsts, seconds = [row.text for row in rows.rows], [row.second for row in rows.rows]
    with fast_fp32(settings.fp32_path) as path:
        vectors = Vectors(base, variant, progress, settings.max_tokens, total=2, same_width=False)
        first_base, first = vectors.of(firsts, "first texts of the pairs")
        second_base, second = vectors.of(seconds, "second texts of the pairs")
    similar = cosines(first_base, second_base), cosines(first, second)
    draws = Bootstrap(len(gold_N), draws=settings.bootstrap_draws, seed=settings.seed, unit="pairs")
    same = variant is base
    pairs = pd.DataFrame({"score": gold_N, "text_a": firsts, "text_b": seconds, "example": rows.hashes})
    agreement: tuple[Metric, ...] = ()
    if first.shape == first_base.shape:
        agreement_N = (cosines(first_base, first) + cosines(second_base, second)) / 2
        agreement = (_agreement(agreement_N, draws, same=same),)
    return Result(
        frames={"pairs": pair_frame(pairs, *similar)},
        views=(SIMILARITIES,),
        metrics=(
            *correlation_metrics("spearman", spearman, gold_N, *similar, draws, same=same),
            *correlation_metrics("pearson", pearson, gold_N, *similar, draws, same=same),
            *agreement,
        ),
        notes=rows.notes,
        provenance=provenance(
            base, variant, rows,
            method="sentence_similarity", protocol=PROTOCOL, settings=settings, began=began,
            conditions={
                "pairs": len(gold_N), "max_tokens": settings.max_tokens, "pooling": variant.pooling,
                "fp32_path": path.name,
            },
        ),
    )  # fmt: skip


def _agreement(agreement_N: Floats, draws: Bootstrap, *, same: bool) -> Metric:
    between = (
        Interval.exact(1.0, "the variant is the base itself")
        if same
        else draws.ratio(agreement_N, np.ones_like(agreement_N))
    )
    value = float(agreement_N.mean())
    return Metric(
        "cosine_agreement",
        value,
        "cosine",
        "higher",
        len(agreement_N),
        between.low,
        between.high,
        between.how,
    )
