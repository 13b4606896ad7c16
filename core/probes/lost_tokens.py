"""Lost tokens: on which kinds of tokens, and in which texts, a student is worse than its teacher.

Legend: T predicted tokens, N documents, V vocabulary.

How much worse on the whole is the evaluation's matter; this says what the loss consists of.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from core.errors import BadInput, SlimscopeError
from core.evaluate._intervals import Bootstrap
from core.evaluate._token_scores import TokenScores, compare_logits
from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._provenance import provenance
from core.probes._token_kinds import EDGES, KINDS, NATS, banded, form_of, frequency_classes, repeated_classes
from core.probes._twin_text import PROMPT, TwinText, TwinTextSettings, read_twin_text, twin_cost
from core.probes._twins import conditions
from core.registry import Example, method
from core.types import Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

Floats = NDArray[np.float64]
DRAWS = 2000
CONTEXT = 12
"""Tokens shown before one that was lost."""
LOGIT_BYTES = 256 << 20
"""Logits of one forward pass."""


class LostTokensSettings(TwinTextSettings):
    """Text, and how much of it to list."""

    tokens: int = Field(256, ge=8, le=256, description="Tokens of each, from its beginning")
    top: int = Field(
        100, ge=10, le=1000, description="Tokens and documents listed, those with most loss first"
    )


@method(
    "probe",
    title="Lost tokens",
    needs=["decoder", "text"],
    paper="https://arxiv.org/abs/2209.11895",
    answers="What did compression break?",
    examples=(
        Example("Text of eight kinds", PROMPT),
        Example("Reference prose alone", PROMPT, {"text": "pydoc"}),
    ),
    cost=twin_cost,
)
def lost_tokens(
    loaded: LoadedModel,
    reference: LoadedModel,
    prompt: Prompt,
    progress: Progress,
    settings: LostTokensSettings,
) -> Result:
    """Say on which kinds of tokens a student lost against its teacher.

    Both models read the same documents. A token's loss is −ln p(token | before) of the student less the teacher's, in
    nats; its mean over all tokens is what the student lost in all. Each kind cuts all tokens into classes: how frequent the
    token is in this text, what it is made of, whether the text already showed it (after the same token: what an induction
    head completes), how many tokens stand before it, how hard the teacher finds it, and the kind of text where that is
    known. A class's share of the loss beside its share of the tokens says where the student is worse than it is elsewhere.

    Intervals resample documents. Where the teacher is hard pressed itself, a student can gain by chance: read difficulty
    as a way to see whether sure things or guesses were lost, not as a cause.
    """
    started = time.perf_counter()
    text = read_twin_text(loaded, reference, prompt, settings)
    scores: dict[int, TokenScores] = {}
    with (
        loaded.lock,
        reference.lock,
        torch.inference_mode(),
        fast_fp32(n_experts=loaded.anatomy.n_experts) as path,
    ):
        at_once = max(1, LOGIT_BYTES // (8 * reference.anatomy.vocab_size * settings.tokens))
        numbers = range(len(text.ids))
        for start in range(0, len(numbers), at_once):
            progress(start, len(numbers), f"reading {text.name} with both")
            for documents, ids_BP in text.batches(numbers[start : start + at_once], loaded.device):
                if ids_BP.shape[1] > 1:
                    scores |= dict(zip(documents, _scores(loaded, reference, ids_BP), strict=True))
    if not scores:
        raise BadInput(f"{text.name} has no token with one before it; give longer text")
    tokens = _tokens(text, scores)
    bootstrap = Bootstrap(int(tokens["document"].nunique()), draws=DRAWS, seed=0)
    kinds = _classes(tokens, bootstrap)
    return Result(
        frames={
            "main": kinds,
            "tokens": tokens.sort_values("lost_nats", ascending=False, ignore_index=True).head(settings.top),
            "documents": _documents(tokens, text).head(settings.top),
        },
        views=_VIEWS,
        metrics=_metrics(tokens, bootstrap),
        provenance=provenance(
            loaded,
            prompt,
            method="lost_tokens",
            settings=settings,
            started=started,
            conditions=conditions(text.conditions, reference, path),
            exactness_gap=_gap(kinds, tokens),
            exactness_check="largest |Σ over classes of share × mean loss − mean loss of all tokens| of any kind, nats",
        ),
        notes=(
            f"Student: {loaded.ref}. Teacher: {reference.ref}. Positive: the student is worse.",
            "A document's first token has nothing before it and is not counted. Frequency is counted in the text read here.",
            "Classes overlap between kinds (a rare token is mostly a new one), so shares of different kinds do not add up.",
        ),
    )


def _scores(loaded: LoadedModel, reference: LoadedModel, ids_BP: Tensor) -> list[TokenScores]:
    """Both models' surprisal of every token but the first, document by document.

    A vocabulary padded in one of the two is compared on what both have.
    """
    logits = [model.model(input_ids=ids_BP, use_cache=False).logits[:, :-1] for model in (reference, loaded)]
    both = min(one.shape[-1] for one in logits)
    found = []
    for base_PV, variant_PV, ids_P in zip(*logits, ids_BP, strict=True):
        scores = compare_logits(base_PV[:, :both], variant_PV[:, :both], ids_P[1:])
        for name, numbers in ((reference.ref, scores.nats_base), (loaded.ref, scores.nats_variant)):
            if not np.isfinite(numbers).all():
                raise SlimscopeError(
                    f"{name} gives logits that are not finite; open it in float32, or check its weights"
                )
        found.append(scores)
    return found


def _tokens(text: TwinText, scores: dict[int, TokenScores]) -> pd.DataFrame:
    """One row per predicted token: its classes, and both models' nats."""
    frequency = frequency_classes(text.ids)
    rows = []
    for number, (document, one) in enumerate(sorted(scores.items())):
        ids, strings = text.ids[document], text.strings(document)
        n = len(ids) - 1
        rows.append(
            pd.DataFrame(
                {
                    "document": number,
                    "source": document,
                    "position": range(1, n + 1),
                    "token": strings[1:],
                    "before": ["".join(strings[max(0, at - CONTEXT) : at]) for at in range(1, n + 1)],
                    "nats_teacher": one.nats_base,
                    "nats_student": one.nats_variant,
                    "lost_nats": one.nats_variant - one.nats_base,
                    "kl_nats": one.kl,
                    "teacher_says": text.tokens_of(one.top_base),
                    "student_says": text.tokens_of(one.top_variant),
                    "frequency": [frequency[id_] for id_ in ids[1:]],
                    "form": [form_of(token, before) for before, token in pairwise(strings)],
                    "repeated": repeated_classes(ids),
                    "position_band": banded(list(range(1, n + 1)), EDGES),
                    "difficulty": banded(list(one.nats_base), NATS, " nats"),
                    "kind_of_text": text.labels[document],
                }
            )
        )
    return pd.concat(rows, ignore_index=True)


def _classes(tokens: pd.DataFrame, bootstrap: Bootstrap) -> pd.DataFrame:
    """One row per kind and class: its mean loss with interval, its share of tokens and of the whole loss."""
    kinds = {("position_band" if name == "position" else name): title for name, title in KINDS.items()}
    if tokens["kind_of_text"].ne("").all():
        kinds["kind_of_text"] = "Kind of text"
    n_documents, total = bootstrap.n_documents, float(tokens["lost_nats"].sum())
    rows = []
    for column, title in kinds.items():
        for name, some in tokens.groupby(column, sort=False):
            lost_D, count_D = (
                _per_document(some, "lost_nats", n_documents),
                _per_document(some, None, n_documents),
            )
            with np.errstate(invalid="ignore", divide="ignore"):
                interval = bootstrap.ratio(lost_D, count_D)
            share = len(some) / len(tokens)
            rows.append(
                {
                    "kind": title,
                    "class": str(name),
                    "lost_nats": float(some["lost_nats"].mean()),
                    "low": np.nan if interval.low is None else interval.low,
                    "high": np.nan if interval.high is None else interval.high,
                    "share_of_tokens": share,
                    "share_of_loss": float(some["lost_nats"].sum()) / total if total else np.nan,
                    "nats_teacher": float(some["nats_teacher"].mean()),
                    "tokens": len(some),
                    "documents": int((count_D > 0).sum()),
                }
            )
    found = pd.DataFrame(rows)
    return found.sort_values(["kind", "lost_nats"], ascending=[True, False], ignore_index=True)


def _per_document(tokens: pd.DataFrame, column: str | None, n_documents: int) -> Floats:
    """[N] a column's sum over each document's tokens, or their number."""
    weights = None if column is None else tokens[column]
    return np.bincount(tokens["document"], weights, n_documents).astype(np.float64)


def _documents(tokens: pd.DataFrame, text: TwinText) -> pd.DataFrame:
    """One row per document, those that lost most first."""
    grouped = tokens.groupby("source", as_index=False)
    found = grouped.agg(
        tokens=("token", "size"),
        nats_teacher=("nats_teacher", "mean"),
        nats_student=("nats_student", "mean"),
        lost_nats=("lost_nats", "mean"),
        kl_nats=("kl_nats", "mean"),
        kind_of_text=("kind_of_text", "first"),
    )
    begins = ["".join(text.strings(document))[:60] for document in found["source"]]
    return found.assign(begins=begins).sort_values("lost_nats", ascending=False, ignore_index=True)


def _metrics(tokens: pd.DataFrame, bootstrap: Bootstrap) -> tuple[Metric, ...]:
    n, n_documents = len(tokens), bootstrap.n_documents
    count_D = _per_document(tokens, None, n_documents)
    found = []
    for name, column in (("loss_added", "lost_nats"), ("kl", "kl_nats")):
        between = bootstrap.ratio(_per_document(tokens, column, n_documents), count_D)
        value = float(tokens[column].mean())
        found.append(Metric(name, value, "nats/token", "lower", n, between.low, between.high, between.how))
    worse = float((tokens["lost_nats"] > 0).mean())
    most = tokens["lost_nats"].clip(lower=0).sort_values(ascending=False)
    tenth = float(most.iloc[: max(1, n // 10)].sum() / most.sum()) if most.sum() else 0.0
    return (
        *found,
        Metric("tokens_made_worse", worse, "share", "lower", n),
        Metric("worst_tenth_of_added_loss", tenth, "share", "neither", n),
    )


def _gap(kinds: pd.DataFrame, tokens: pd.DataFrame) -> float:
    sums = (kinds["lost_nats"] * kinds["share_of_tokens"]).groupby(kinds["kind"]).sum()
    return float((sums - tokens["lost_nats"].mean()).abs().max())


_CLASS = ("low", "high", "share_of_tokens", "share_of_loss", "nats_teacher", "tokens", "documents")
_TOKEN = (
    "before",
    "position",
    "nats_teacher",
    "nats_student",
    "teacher_says",
    "student_says",
    "frequency",
    "repeated",
)
_VIEWS = (
    View(
        "bar",
        x="class",
        y="lost_nats",
        color="kind",
        title="Loss added, by kind of token",
        unit="nats/token",
        nominal=True,
        tooltip=_CLASS,
    ),
    View(
        "table", x="class", y="lost_nats", text="kind", title="Loss added, by kind of token", tooltip=_CLASS
    ),
    View(
        "table",
        x="token",
        color="lost_nats",
        text="before",
        frame="tokens",
        title="Tokens that were lost most",
        unit="nats",
        tooltip=_TOKEN,
    ),
    View(
        "table",
        x="begins",
        y="lost_nats",
        frame="documents",
        title="Documents that were lost most",
        unit="nats/token",
        tooltip=("kind_of_text", "tokens", "nats_teacher", "nats_student", "kl_nats"),
    ),
)
