"""Sentence-embedding quality of a variant against its base: cosine agreement, and Spearman on labelled pairs.

Knows vectors and labels. How an encoder makes a sentence vector is ``core.models.embed``'s knowledge.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import CannotMeasure
from core.evaluate._comparison import provenance, refuse_calibration
from core.evaluate._correlation import correlation_metrics, spearman
from core.evaluate._intervals import Bootstrap, Floats, Interval
from core.evaluate._vectors import SIMILARITIES, Vectors, cosines, pair_frame
from core.journal import Journal
from core.models.fp32_path import Fp32Setting, fast_fp32
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.text.pairs import Pairs, load_pairs
from core.text.sentences import sentences
from core.types import Documents, Metric, Progress, Result, View, content_hash

PROTOCOL_TEXT = (
    "Each sentence is embedded by both models (pooled and normalised as the checkpoint says) in the same "
    "batches. Cosine agreement: mean cosine of the two vectors of a sentence; p1: its 1st percentile. "
    "Spearman: rank correlation, ties at their mean rank, of people's scores with the cosine of a pair's two "
    "vectors. Intervals: 95 %, documents (cosine) or pairs (Spearman) resampled, both models on the same draws."
)
PROTOCOL = f"sentence embedding agreement, version 1 ({content_hash(PROTOCOL_TEXT)[:8]})"


class EmbeddingAgreementSettings(Settings):
    """How many sentences, and which labelled pairs."""

    max_documents: int = Field(24, ge=1, le=10_000, description="Documents used, the first of the text")
    document_sentences: int = Field(
        12, ge=1, le=10_000, description="Sentences used of each document, from its beginning"
    )
    max_tokens: int = Field(128, ge=4, le=131_072, description="Tokens after which a text is cut")
    pairs: str = Field(
        "",
        description="File of labelled pairs (score, text, text; .tsv or .csv) for Spearman; empty for none",
    )
    bootstrap_draws: int = Field(2000, ge=500, le=100_000, description="Resamplings for the intervals")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the resampling")
    fp32_path: Fp32Setting = Field(
        "auto", description="Kernels of float32 products: auto takes oneDNN's where proven equal, exact never"
    )


@method(
    "evaluate",
    title="Embedding agreement",
    needs=("encoder", "text"),
    paper="Cer et al., SemEval-2017 Task 1: Semantic Textual Similarity, arXiv:1708.00055",
)
def run(
    base: LoadedModel,
    variant: LoadedModel,
    documents: Documents,
    journal: Journal,
    progress: Progress,
    settings: EmbeddingAgreementSettings,
) -> Result:
    """How far a variant's sentence vectors moved from its base's, and whether similarity still ranks as people rank.

    Cosine agreement is the mean cosine between the two vectors of the same sentence; its 1st percentile shows
    the sentences that moved most. With a file of pairs scored by people, Spearman's rank correlation between
    scores and cosine similarities is given for variant and base, and their difference resampled in pairs.
    """
    began = time.perf_counter()
    texts, owner = _sentences(documents, settings)
    pairs = load_pairs(Path(settings.pairs).expanduser()) if settings.pairs else None
    with fast_fp32(settings.fp32_path) as path:
        vectors = Vectors(base, variant, progress, settings.max_tokens, 3 if pairs else 1)
        cosine_N = cosines(*vectors.of(texts, "sentences"))
        similar = _similarities(vectors, pairs) if pairs else None
    bootstrap = Bootstrap(int(owner[-1]) + 1, draws=settings.bootstrap_draws, seed=settings.seed)
    metrics = list(_agreement_metrics(cosine_N, owner, bootstrap, same=variant is base))
    frames = {
        "sentences": pd.DataFrame({"document": owner, "sentence": texts, "cosine": cosine_N}).sort_values(
            "cosine", kind="stable", ignore_index=True
        )
    }
    if pairs and similar:
        draws = Bootstrap(len(pairs.scores), draws=settings.bootstrap_draws, seed=settings.seed, unit="pairs")
        metrics += correlation_metrics(
            "spearman", spearman, np.array(pairs.scores), *similar, draws, same=variant is base
        )
        frames["pairs"] = pair_frame(
            pd.DataFrame({"score": pairs.scores, "text_a": pairs.first, "text_b": pairs.second}), *similar
        )
    return Result(
        frames=frames,
        views=_views(frames),
        metrics=tuple(metrics),
        provenance=provenance(
            base,
            variant,
            documents,
            method="embedding_agreement",
            protocol=PROTOCOL,
            settings=settings,
            began=began,
            inputs={"pairs": pairs.fingerprint} if pairs else {},
            conditions={
                "documents": bootstrap.n_documents,
                "sentences": len(texts),
                "pairs": pairs.name if pairs else "",
                "max_tokens": settings.max_tokens,
                "pooling": variant.pooling,
                "fp32_path": path.name,
            },
        ),
    )


def _sentences(
    documents: Documents, settings: EmbeddingAgreementSettings
) -> tuple[list[str], NDArray[np.int64]]:
    """Sentences, and for each the number of its document among those that have any."""
    refuse_calibration(documents)
    per_document = [
        found
        for text in documents.texts[: settings.max_documents]
        if (found := sentences(text, limit=settings.document_sentences))
    ]
    if not per_document:
        raise CannotMeasure(f"{documents.name} has no sentence of five words or more; give prose")
    owner = np.repeat(np.arange(len(per_document)), [len(found) for found in per_document])
    return [sentence for found in per_document for sentence in found], owner


def _similarities(vectors: Vectors, pairs: Pairs) -> tuple[Floats, Floats]:
    """Cosine similarity of every pair's two texts under the base and under the variant."""
    first_base, first_variant = vectors.of(pairs.first, "first texts of the pairs")
    second_base, second_variant = vectors.of(pairs.second, "second texts of the pairs")
    return cosines(first_base, second_base), cosines(first_variant, second_variant)


def _agreement_metrics(
    cosine_N: Floats, owner_N: NDArray[np.int64], bootstrap: Bootstrap, *, same: bool
) -> tuple[Metric, ...]:
    sums_D = np.bincount(owner_N, weights=cosine_N).astype(np.float64)
    numbers_D = np.bincount(owner_N).astype(np.float64)
    found = (
        ("cosine_agreement", float(cosine_N.mean()), bootstrap.ratio(sums_D, numbers_D)),
        (
            "cosine_agreement_p1",
            float(np.quantile(cosine_N, 0.01, method="inverted_cdf")),
            bootstrap.quantile(cosine_N, owner_N, 0.01),
        ),
    )
    exact = Interval.exact(1.0, "the variant is the base itself")
    between = [(name, value, exact if same else interval) for name, value, interval in found]
    return tuple(
        Metric(name, value, "cosine", "higher", len(cosine_N), i.low, i.high, i.how)
        for name, value, i in between
    )


def _views(frames: Mapping[str, pd.DataFrame]) -> tuple[View, ...]:
    found = [
        View(
            "scatter",
            x="document",
            y="cosine",
            frame="sentences",
            title="Cosine between the variant's and the base's vector of each sentence",
            unit="cosine",
            tooltip=("sentence",),
        )
    ]
    if "pairs" in frames:
        found.append(SIMILARITIES)
    return tuple(found)
