"""From document scores to the numbers, frames and views of a language-modelling result.

Knows sums and intervals; nothing about models or text. Letters: D documents, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import exp, log
from typing import Literal

import numpy as np
import pandas as pd

from core.evaluate._document_score import MAX_WORST, DocumentScore
from core.evaluate._intervals import MIN_DOCUMENTS, Bootstrap, Floats, Interval
from core.models.kv_cache import KvCache
from core.types import Metric, View

TAIL_POINTS = 80
POSITION_COLUMNS = (
    "document",
    "position",
    "before",
    "token",
    "kl",
    "nats_base",
    "nats_variant",
    "top_base",
    "top_variant",
)


def metrics(
    scores: Sequence[DocumentScore], bootstrap: Bootstrap, *, same: bool, kv_cache: KvCache = "model"
) -> tuple[Metric, ...]:
    """The headline numbers with their intervals; ``same`` says that the variant is the base itself.

    Under another KV cache they are other numbers, and carry its name.
    """
    if kv_cache != "model":
        under_cache = metrics(scores, bootstrap, same=False)
        return tuple(replace(metric, name=f"{metric.name}_kv_{kv_cache}") for metric in under_cache)
    tokens_D, bytes_D = _column(scores, "tokens"), _column(scores, "bytes")
    base_D, variant_D = _column(scores, "nats_base"), _column(scores, "nats_variant")
    bits_D, base_bits_D = variant_D / log(2), base_D / log(2)
    kl_D = np.array([sum(score.kl) for score in scores])
    kl_N = np.concatenate([score.kl for score in scores])
    owner_N = np.repeat(np.arange(len(scores)), tokens_D.astype(int))
    agreements_D = _column(scores, "agreements")
    flips_D = _column(scores, "lost") + _column(scores, "gained")
    n = int(tokens_D.sum())
    nats = bootstrap.ratio(variant_D, tokens_D)

    def metric(
        name: str, value: float, unit: str, better: Literal["lower", "higher"], between: Interval
    ) -> Metric:
        return Metric(name, float(value), unit, better, n, between.low, between.high, between.how)

    def compared(
        name: str, value: float, unit: str, between: Interval, better: Literal["lower", "higher"]
    ) -> Metric:
        exact = Interval.exact(float(value), "the variant is the base itself")
        return metric(name, value, unit, better, exact if same else between)

    return (
        compared("kl", kl_D.sum() / n, "nats/token", bootstrap.ratio(kl_D, tokens_D), "lower"),
        metric(
            "bits_per_byte",
            bits_D.sum() / bytes_D.sum(),
            "bits/byte",
            "lower",
            bootstrap.ratio(bits_D, bytes_D),
        ),
        metric("perplexity", exp(variant_D.sum() / n), "per token", "lower", nats.mapped(exp)),
        compared(
            "top1_agreement",
            agreements_D.sum() / n,
            "share",
            bootstrap.share(agreements_D, tokens_D),
            "higher",
        ),
        compared("flips", flips_D.sum() / n, "share", bootstrap.share(flips_D, tokens_D), "lower"),
        compared(
            "delta_bits_per_byte",
            (bits_D - base_bits_D).sum() / bytes_D.sum(),
            "bits/byte",
            bootstrap.ratio(bits_D - base_bits_D, bytes_D),
            "lower",
        ),
        compared(
            "kl_p99",
            np.quantile(kl_N, 0.99, method="inverted_cdf"),
            "nats/token",
            bootstrap.quantile(kl_N, owner_N, 0.99),
            "lower",
        ),
    )


def frames(scores: Sequence[DocumentScore]) -> Mapping[str, pd.DataFrame]:
    """``documents`` (one row each), ``positions`` (tokens that moved most) and ``tail`` (how many moved how far)."""
    documents = pd.DataFrame([asdict(score) for score in scores]).drop(columns=["kl", "worst"])
    sums = documents[["tokens", "bytes"]]
    documents["kl"] = [float(np.mean(score.kl)) for score in scores]
    documents["bits_per_byte_base"] = documents["nats_base"] / log(2) / sums["bytes"]
    documents["bits_per_byte"] = documents["nats_variant"] / log(2) / sums["bytes"]
    documents["delta_bits_per_byte"] = documents["bits_per_byte"] - documents["bits_per_byte_base"]
    documents["top1_agreement"] = documents["agreements"] / sums["tokens"]
    documents["flips"] = (documents["lost"] + documents["gained"]) / sums["tokens"]
    worst = pd.DataFrame([row for score in scores for row in score.worst], columns=list(POSITION_COLUMNS))
    worst = worst.sort_values("kl", ascending=False, kind="stable").head(MAX_WORST).reset_index(drop=True)
    return {"documents": documents, "positions": worst, "tail": _tail(scores)}


def views(found: Mapping[str, pd.DataFrame]) -> tuple[View, ...]:
    """How to look at the frames."""
    tail_has_values = bool((found["tail"]["kl"] > 0).all())
    return (
        View(
            "scatter",
            x="bits_per_byte_base",
            y="kl",
            frame="documents",
            title="KL by document, against how hard the base finds it",
            unit="nats/token",
            tooltip=("document", "begins", "tokens", "top1_agreement", "flips", "delta_bits_per_byte"),
        ),
        View(
            "line",
            x="share",
            y="kl",
            frame="tail",
            title="KL that this share of tokens reaches or exceeds",
            unit="nats/token",
            log=tail_has_values,
        ),
        View(
            "table",
            x="token",
            color="kl",
            text="before",
            frame="positions",
            title="Tokens whose prediction moved most",
            unit="nats",
            tooltip=("document", "position", "nats_base", "nats_variant", "top_base", "top_variant"),
        ),
    )


def notes(scores: Sequence[DocumentScore], *, n_skipped: int) -> tuple[str, ...]:
    """What a reader must know to read the numbers right."""
    lost, gained = sum(score.lost for score in scores), sum(score.gained for score in scores)
    flipped = f"Flips: {lost} tokens went from right to wrong, {gained} from wrong to right"
    said = [f"{flipped}; right means that the most likely token is the true one."]
    if n_skipped:
        said.append(f"{n_skipped} documents are too short to score and were left out.")
    if len(scores) < MIN_DOCUMENTS:
        said.append(
            f"{len(scores)} documents are too few to resample: no interval is given below {MIN_DOCUMENTS}."
        )
    return tuple(said)


def _tail(scores: Sequence[DocumentScore]) -> pd.DataFrame:
    """KL quantiles from the top: at most ``TAIL_POINTS`` shares, evenly spaced in their logarithm."""
    kl_N = np.sort(np.concatenate([score.kl for score in scores]))[::-1]
    n = len(kl_N)
    ranks = np.unique(np.geomspace(1, n, TAIL_POINTS).round().astype(int))
    return pd.DataFrame({"share": ranks / n, "kl": kl_N[ranks - 1]})


def _column(scores: Sequence[DocumentScore], name: str) -> Floats:
    """[D] one number of every document."""
    return np.array([getattr(score, name) for score in scores], dtype=np.float64)
