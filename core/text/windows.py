"""From a document to windows of token ids: what is scored, with which context, and how many bytes it is.

Each token is scored exactly once. Inside a document, window after window moves on by ``stride`` tokens and
scores only the tokens that no earlier window scored, so a token sees at least ``window - stride`` tokens
before it (less only at the document's beginning, where there are no more). A token without any context is not
scored, and its bytes are not counted.

Bits per byte is only comparable between models when the bytes are exactly those of the scored tokens. A
tokenizer over bytes may spread one character over several tokens; scoring therefore starts and ends between
characters. Knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import CannotMeasure

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """Tokens ``[begin, end)`` of a document, of which ``[first, end)`` are scored."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True)
class EncodedDocument:
    """A document as token ids, with each token's place in the text."""

    text: str
    ids: Ints
    """[T]; the beginning-of-sequence token first, if the tokenizer adds one."""
    starts: Ints
    """[T]; index of each token's first character."""
    ends: Ints
    """[T]; index behind each token's last character."""
    first_scored: int
    """Index of the first token that has a context and begins a character."""
    has_bos: bool

    @property
    def n_scored(self) -> int:
        """Tokens that are scored; 0 where the text is too short."""
        return max(0, len(self.ids) - self.first_scored)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of exactly the scored tokens' text."""
        if not self.n_scored:
            return 0
        return len(self.text[self.ends[: self.first_scored].max() : self.ends.max()].encode())


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer by itself puts its beginning-of-sequence token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def encode_document(tokenizer: Any, text: str, *, max_tokens: int) -> EncodedDocument:
    """Token ids of the first ``max_tokens`` tokens of ``text`` (the BOS token not counted).

    No end-of-sequence token, no truncation of the text before tokenizing (that would change tokens at the
    cut). Raises ``CannotMeasure`` for a tokenizer that does not tell where its tokens stand in the text.
    """
    if not tokenizer.is_fast:
        raise CannotMeasure(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text, so bytes cannot be "
            "counted; use a model that comes with a tokenizer.json"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    between = _between_characters(starts, ends)
    stop = min(max_tokens, len(ids))
    while not between[stop]:
        stop -= 1
    ids, starts, ends = ids[:stop], starts[:stop], ends[:stop]
    if adds_bos(tokenizer):
        bos, zero = np.array([tokenizer.bos_token_id]), np.zeros(1, dtype=np.int64)
        ids, starts, ends = (np.concatenate(pair) for pair in ((bos, ids), (zero, starts), (zero, ends)))
        return EncodedDocument(text, ids, starts, ends, 1, has_bos=True)
    first = next((index for index in range(1, stop) if between[index]), stop)
    return EncodedDocument(text, ids, starts, ends, first, has_bos=False)


def _between_characters(starts: Ints, ends: Ints) -> NDArray[np.bool_]:
    """[T + 1]; whether the cut before token i separates characters, i.e. no character lies on both sides."""
    reached = np.maximum.accumulate(np.concatenate([[0], ends]))
    return np.concatenate([starts, [reached[-1]]]) >= reached


def sliding_windows(n_tokens: int, first_scored: int, *, window: int, stride: int) -> list[Window]:
    """Windows of at most ``window`` tokens that together score ``[first_scored, n_tokens)`` exactly once.

    Needs ``1 <= stride < window`` and ``1 <= first_scored < window``.
    """
    assert 1 <= stride < window, f"stride {stride}, window {window}"
    assert 1 <= first_scored < window, f"first scored token {first_scored}, window {window}"
    windows: list[Window] = []
    scored = first_scored
    while scored < n_tokens:
        end = min(n_tokens, scored + stride if windows else window)
        windows.append(Window(max(0, end - window), scored, end))
        scored = end
    return windows
