"""Next-token predictions of a text, piece by piece, under one routing after another; and what a change cost.

Legend: S pieces (passages of documents), G documents, N predicted tokens of a piece, X whatever is compared.

The documents and their passages are those of ``_routed_text.py``. A change is compared with the original on the same
tokens; documents, never tokens, are what an interval resamples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import BadInput, CannotMeasure
from core.evaluate._intervals import MIN_DOCUMENTS, Bootstrap
from core.evaluate._token_scores import compare_logits
from core.lazy import torch
from core.probes._routed_text import Texts, TextSettings, find_texts, text_cost, token_passages
from core.types import Cost, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
DRAWS = 2000
DOCUMENTS = 16
"""The text is cut into longer pieces as long as this many documents take part: enough to resample."""


@dataclass(frozen=True)
class Pieces:
    """Token ids to predict, at least two per piece."""

    texts: Texts
    ids: tuple[Tensor, ...]
    document_S: Ints
    """Documents numbered from 0, in the order they first appear."""

    @classmethod
    def of(cls, loaded: LoadedModel, prompt: Prompt, settings: TextSettings) -> Pieces:
        """Cut the settings' text; raises ``BadInput`` where nothing in it can be predicted."""
        texts = find_texts(loaded, prompt, settings.text)
        passages = token_passages(loaded, texts, settings.max_tokens, DOCUMENTS)
        found = [(document, ids) for document, ids in passages if len(ids) > 1]
        if not found:
            raise BadInput(
                f"{texts.name} has no two tokens in a row, so nothing to predict; give longer text"
            )
        _, number_S = np.unique([document for document, _ in found], return_inverse=True)
        ids = tuple(torch.tensor(ids, device=loaded.model.device) for _, ids in found)
        return cls(texts, ids, number_S.astype(np.int64))

    @property
    def n_documents(self) -> int:
        """G."""
        return int(self.document_S.max()) + 1

    @property
    def n_predicted(self) -> int:
        """Predicted tokens of all pieces."""
        return sum(len(ids) - 1 for ids in self.ids)

    def per_document(self, sums_SX: Sequence[Any] | NDArray[Any]) -> Floats:
        """[G, X]: each document's sum of its pieces' numbers."""
        values_SX = np.asarray(sums_SX, dtype=np.float64)
        sums_GX = np.zeros((self.n_documents, *values_SX.shape[1:]))
        np.add.at(sums_GX, self.document_S, values_SX)
        return sums_GX

    @property
    def predicted_G(self) -> Floats:
        """Predicted tokens of each document."""
        return self.per_document([len(ids) - 1 for ids in self.ids])

    def bootstrap(self) -> Bootstrap:
        """Draws of documents, the same for every number compared."""
        return Bootstrap(self.n_documents, draws=DRAWS, seed=0)

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers depend on, for the provenance."""
        return {
            "text": self.texts.name,
            "text_fingerprint": self.texts.fingerprint,
            "documents": self.n_documents,
            "predicted_tokens": self.n_predicted,
        }

    @property
    def note(self) -> str:
        """On what the numbers rest, in one sentence."""
        few = "" if self.n_documents >= MIN_DOCUMENTS else f"; below {MIN_DOCUMENTS} there is no interval"
        return f"{self.n_predicted} predicted tokens of {self.texts.name}: documents {self.n_documents}{few}."


@dataclass(frozen=True)
class Predicted:
    """What a model says of one piece's tokens, each from those before it."""

    nats_N: Floats
    """Surprisal of the true token."""
    top_N: Ints
    """The most likely token."""


def predict(loaded: LoadedModel, ids_T: Tensor) -> Predicted:
    """One forward pass over a piece; raises ``CannotMeasure`` for logits that are not finite."""
    logits_TV = loaded.model(ids_T[None], use_cache=False).logits[0]
    scores = compare_logits(logits_TV[:-1], None, ids_T[1:])
    if not np.isfinite(scores.nats_base).all():
        raise CannotMeasure(f"{loaded.ref} gives logits that are not finite numbers here; open it in float32")
    return Predicted(scores.nats_base, scores.top_base)


def numbers(text: str, *, what: str, allowed: Sequence[int]) -> tuple[int, ...]:
    """A typed list such as ``1, 2, 4`` in rising order, all that is allowed for empty text; raises ``BadInput``."""
    if not text.strip():
        return tuple(allowed)
    parts = [part for part in re.split(r"[\s,;]+", text.strip()) if part]
    wrong = [part for part in parts if not part.isdecimal() or int(part) not in allowed]
    if wrong:
        raise BadInput(
            f"{what} {wrong[0]!r} is none of {_listed(allowed)}; give some of them, e.g. {allowed[0]}, {allowed[-1]}, or "
            "nothing for all"
        )
    return tuple(sorted({int(part) for part in parts}))


def _listed(allowed: Sequence[int]) -> str:
    run = list(allowed) == list(range(allowed[0], allowed[-1] + 1))
    return f"{allowed[0]} to {allowed[-1]}" if run and len(allowed) > 2 else ", ".join(map(str, allowed))


def runs_cost(anatomy: Anatomy, n_tokens: int, settings: TextSettings, runs: float) -> Cost:
    """What reading the whole text so many times takes."""
    once = text_cost(anatomy, n_tokens, settings)
    return Cost(runs * once.forwards, once.extra_bytes + 3 * 4 * 512 * anatomy.vocab_size)
