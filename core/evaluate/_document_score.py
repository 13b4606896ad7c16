"""One document's score under two models: plain numbers that add up over documents and survive a restart.

Knows one document at a time; nothing about intervals or how results are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from core.errors import CannotMeasure
from core.evaluate._token_scores import TokenScores, score_window
from core.models.kv_cache import KvCache
from core.models.loaded import LoadedModel
from core.text.windows import EncodedDocument, Window

Row = dict[str, Any]
"""A ``DocumentScore`` as plain data (JSON): what a journal keeps."""
MAX_WORST = 200
"""Tokens with the highest KL that are kept with their context."""
CONTEXT_CHARACTERS = 60


@dataclass(frozen=True)
class DocumentScore:
    """Sums over one document's scored tokens, its KL values, and its worst tokens."""

    document: int
    begins: str
    tokens: int
    bytes: int
    nats_base: float
    nats_variant: float
    agreements: int
    """Tokens where both models put the same token first."""
    right_base: int
    right_variant: int
    """Tokens where the first token is the true one."""
    lost: int
    gained: int
    """Flips: right before and wrong now; wrong before and right now."""
    kl: list[float]
    worst: list[Row]

    def row(self) -> Row:
        """The score as plain data; ``DocumentScore(**row)`` reads it back."""
        return asdict(self)


def score_document(
    base: LoadedModel,
    variant: LoadedModel,
    encoded: EncodedDocument,
    windows: list[Window],
    *,
    document: int,
    on_window: Callable[[], None],
    kv_cache: KvCache = "model",
) -> DocumentScore:
    """Run both models over one document; raises ``CannotMeasure`` naming the document for non-finite logits."""
    parts: list[TokenScores] = []
    for window in windows:
        try:
            parts.append(score_window(base, variant, encoded.ids, window, kv_cache=kv_cache))
        except CannotMeasure as error:
            raise CannotMeasure(f"document {document} ({begins(encoded.text)!r}): {error}") from None
        on_window()
    scores = TokenScores.joined(parts)
    truth = encoded.ids[encoded.first_scored :]
    right_base, right_variant = scores.top_base == truth, scores.top_variant == truth
    return DocumentScore(
        document=document,
        begins=begins(encoded.text),
        tokens=encoded.n_scored,
        bytes=encoded.n_bytes,
        nats_base=float(scores.nats_base.sum()),
        nats_variant=float(scores.nats_variant.sum()),
        agreements=int((scores.top_base == scores.top_variant).sum()),
        right_base=int(right_base.sum()),
        right_variant=int(right_variant.sum()),
        lost=int((right_base & ~right_variant).sum()),
        gained=int((~right_base & right_variant).sum()),
        kl=scores.kl.tolist(),
        worst=_worst_tokens(base.tokenizer, encoded, scores, document),
    )


def begins(text: str) -> str:
    """A document's first words, to know it by."""
    return " ".join(text[: 2 * CONTEXT_CHARACTERS].split())[:CONTEXT_CHARACTERS]


def _worst_tokens(tokenizer: Any, encoded: EncodedDocument, scores: TokenScores, document: int) -> list[Row]:
    """The tokens where the variant's prediction moved most, with the text before them."""
    order = np.argsort(-scores.kl, kind="stable")[:MAX_WORST]
    rows = []
    for index in order[scores.kl[order] > 0]:
        position = encoded.first_scored + int(index)
        start, end = int(encoded.starts[position]), int(encoded.ends[position])
        rows.append(
            {
                "document": document,
                "position": position,
                "before": encoded.text[max(0, start - CONTEXT_CHARACTERS) : start],
                "token": encoded.text[start:end],
                "kl": float(scores.kl[index]),
                "nats_base": float(scores.nats_base[index]),
                "nats_variant": float(scores.nats_variant[index]),
                "top_base": tokenizer.decode([int(scores.top_base[index])]),
                "top_variant": tokenizer.decode([int(scores.top_variant[index])]),
            }
        )
    return rows
