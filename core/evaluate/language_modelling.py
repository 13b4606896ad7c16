"""Language-model quality of a variant against its base on running text: KL, bits per byte, agreement, flips.

Knows how documents are scored and summed up. Refuses to know where models come from and where results go.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from core.errors import BadInput, CannotMeasure
from core.evaluate._comparison import provenance, refuse_calibration
from core.evaluate._document_score import DocumentScore, score_document
from core.evaluate._intervals import Bootstrap
from core.evaluate._language_summary import frames, metrics, notes, views
from core.journal import Journal
from core.models.fp32_path import Fp32Setting, fast_fp32
from core.models.kv_cache import KvCache
from core.models.loaded import LoadedModel
from core.registry import Settings, method
from core.text.windows import EncodedDocument, Window, encode_document, sliding_windows
from core.types import Documents, Progress, Result, content_hash

PROTOCOL_TEXT = (
    "Sliding windows inside each document, never across documents. Every token is scored once: the first "
    "window scores all its tokens, each later one the tokens after those scored, at most `stride` of them, "
    "with a context of at least window - stride tokens. The beginning-of-sequence token is put first exactly "
    "where the tokenizer does so by itself; otherwise a document's first token has no context and is not "
    "scored. No end-of-sequence token. Bits per byte: nats of scored tokens / ln 2 / UTF-8 bytes of exactly "
    "those tokens. Perplexity: exp of mean nats per scored token. KL: KL(base || variant) of the next-token "
    "distribution over the whole vocabulary, nats, mean over scored tokens. Top-1 agreement: share of scored "
    "tokens where both models rank the same token first. Flips: share where exactly one of the two models "
    "ranks the true token first. Intervals: 95 %, documents resampled, both models on the same draws."
)
PROTOCOL = f"sliding-window language modelling, version 1 ({content_hash(PROTOCOL_TEXT)[:8]})"


class LanguageModellingSettings(Settings):
    """How much text, and with how much context."""

    max_documents: int = Field(24, ge=1, le=10_000, description="Documents used, the first of the text")
    max_document_tokens: int = Field(
        384, ge=8, le=1_000_000, description="Tokens used of each document, from its beginning"
    )
    window: int = Field(
        512, ge=8, le=131_072, description="Tokens a model sees at once; capped by its context length"
    )
    stride: int = Field(256, ge=1, le=131_071, description="Tokens scored by each window after the first")
    bootstrap_draws: int = Field(
        2000, ge=500, le=100_000, description="Resamplings of documents for the intervals"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the resampling")
    kv_cache: KvCache = Field(
        "model",
        description="What the variant keeps keys and values in while it reads; model: its own dtype. Other choices "
        "give numbers of their own names, e.g. kl_kv_int8",
    )
    fp32_path: Fp32Setting = Field(
        "auto", description="Kernels of float32 products: auto takes oneDNN's where proven equal, exact never"
    )

    @model_validator(mode="after")
    def _stride_leaves_context(self) -> LanguageModellingSettings:
        if self.stride >= self.window:
            raise ValueError(f"stride {self.stride} must be smaller than window {self.window}")
        return self


@method(
    "evaluate",
    title="Language modelling",
    needs=("decoder", "text"),
    paper="Dutta et al., Accuracy is Not All You Need, arXiv:2407.09141",
)
def run(
    base: LoadedModel,
    variant: LoadedModel,
    documents: Documents,
    journal: Journal,
    progress: Progress,
    settings: LanguageModellingSettings,
) -> Result:
    """How far a variant's next-token predictions moved from its base's, and what that costs on real text.

    Both models read the same windows of text. KL(base‖variant) = Σ p ln(p/q) over the whole vocabulary, in
    nats per token, says how far the predicted distribution moved; bits per byte and perplexity say how much
    worse (or better) the text is predicted. Top-1 agreement and flips count the tokens where the most likely
    token changed, and where it changed between right and wrong. With ``kv_cache`` every key and value of the variant is
    rounded as it is written; evaluated so, the base itself says what the cache alone costs. Intervals resample whole
    documents, because tokens of one document are alike; the difference in bits per byte is resampled in pairs.

    Finished documents are kept in ``journal``, and one that is there is not run again. Raises ``BadInput`` for models
    that do not share a tokenizer and for calibration text, ``CannotMeasure`` for text without a token to score and
    for logits that are not numbers.
    """
    began = time.perf_counter()
    plans = _plan(base, variant, documents, settings)
    with fast_fp32(
        settings.fp32_path, n_experts=max(base.anatomy.n_experts, variant.anatomy.n_experts)
    ) as path:
        asked = [PROTOCOL, settings.model_dump(mode="json"), _identity(base), _identity(variant), path.name]
        scores = _score(base, variant, plans, journal, progress, asked, kv_cache=settings.kv_cache)
    bootstrap = Bootstrap(len(scores), draws=settings.bootstrap_draws, seed=settings.seed)
    found = frames(scores)
    return Result(
        frames=found,
        views=views(found),
        metrics=metrics(scores, bootstrap, same=variant is base, kv_cache=settings.kv_cache),
        provenance=provenance(
            base,
            variant,
            documents,
            method="language_modelling",
            protocol=PROTOCOL,
            settings=settings,
            began=began,
            conditions={
                "documents": len(scores),
                "tokens": sum(score.tokens for score in scores),
                "bytes": sum(score.bytes for score in scores),
                "window": plans[0].size,
                "stride": plans[0].stride,
                "max_document_tokens": settings.max_document_tokens,
                "kv_cache": settings.kv_cache,
                "bos_added": plans[0].encoded.has_bos,
                "fp32_path": path.name,
            },
        ),
        notes=notes(scores, n_skipped=min(settings.max_documents, len(documents.texts)) - len(scores)),
    )


def _score(
    base: LoadedModel,
    variant: LoadedModel,
    plans: list[_Plan],
    journal: Journal,
    progress: Progress,
    asked: list[Any],
    *,
    kv_cache: KvCache,
) -> list[DocumentScore]:
    """Every document's score, from the journal where it is there; ``asked`` is what all of them depend on."""
    counter = _Counter(progress, sum(len(plan.windows) for plan in plans))
    scores: list[DocumentScore] = []
    for plan in plans:
        counter.begin(f"document {len(scores) + 1} of {len(plans)}")
        key = content_hash([asked, plan.document, plan.encoded.text])
        row = journal.get(key)
        if row is not None:
            counter.advance(len(plan.windows))
            scores.append(DocumentScore(**row))
            continue
        score = score_document(
            base, variant, plan.encoded, plan.windows, document=plan.document, on_window=counter.advance,
            kv_cache=kv_cache,
        )  # fmt: skip
        journal.put(key, score.row())
        scores.append(score)
    return scores


@dataclass(frozen=True)
class _Plan:
    """One document to score, by its place in the text, cut into windows of at most ``size`` tokens."""

    document: int
    encoded: EncodedDocument
    windows: list[Window]
    size: int
    stride: int


@dataclass
class _Counter:
    """Counts windows and passes the count on; whoever listens may raise ``Cancelled``."""

    tell: Progress
    total: int
    done: int = 0
    message: str = ""

    def begin(self, message: str) -> None:
        self.message = message
        self.advance(0)

    def advance(self, windows: int = 1) -> None:
        self.done += windows
        self.tell(self.done, self.total, self.message)


def _plan(
    base: LoadedModel, variant: LoadedModel, documents: Documents, settings: LanguageModellingSettings
) -> list[_Plan]:
    """What is scored of each document that has a token to score."""
    refuse_calibration(documents)
    size = min(settings.window, base.anatomy.context_length, variant.anatomy.context_length)
    stride = min(settings.stride, size - 1)
    plans = []
    for document, text in enumerate(documents.texts[: settings.max_documents]):
        encoded = encode_document(base.tokenizer, text, max_tokens=settings.max_document_tokens)
        if variant is not base:
            other = encode_document(variant.tokenizer, text, max_tokens=settings.max_document_tokens)
            _refuse_other_tokens(base, variant, encoded, other)
        if encoded.n_scored:
            cut = sliding_windows(len(encoded.ids), encoded.first_scored, window=size, stride=stride)
            plans.append(_Plan(document, encoded, cut, size, stride))
    if not plans:
        raise CannotMeasure(
            f"{documents.name} has no document of two tokens or more; there is nothing to predict; give longer text"
        )
    return plans


def _refuse_other_tokens(
    base: LoadedModel, variant: LoadedModel, encoded: EncodedDocument, other: EncodedDocument
) -> None:
    """Two models can be compared token by token only where both read the same token ids and predict as many."""
    widths = base.anatomy.vocab_size, variant.anatomy.vocab_size
    if widths[0] == widths[1] and encoded.ids.tolist() == other.ids.tolist():
        return
    raise BadInput(
        f"{base.ref} and {variant.ref} do not read the same tokens (vocabularies of {widths[0]} and {widths[1]}); "
        "KL, agreement and flips need one tokenizer: choose a variant of this base"
    )


def _identity(loaded: LoadedModel) -> list[str]:
    """What a finished document must agree in to be of the same model."""
    return [loaded.fingerprint, loaded.dtype, loaded.device.split(":")[0]]
