"""Calibration text as passages of token ids: the beginnings of many documents rather than the whole of a few.

Tokens of one document resemble each other, and experts are judged by how varied their tokens are. Nothing is padded.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from core.errors import BadInput
from core.routing.trace import token_ids
from core.types import Documents

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

SHORTEST = 8
"""Shorter ends of documents are left out: they would be all beginning and no context."""


def passages(loaded: LoadedModel, documents: Documents, *, length: int, max_tokens: int) -> list[list[int]]:
    """Passages of at most ``length`` tokens, one of each document in turn, until they hold ``max_tokens``.

    Raises ``BadInput`` for text that gives none.
    """
    size = min(length, loaded.anatomy.context_length)
    waiting = deque(token_ids(loaded, text) for text in documents.texts)
    found: list[list[int]] = []
    left = max_tokens
    while waiting and left >= SHORTEST:
        ids = waiting.popleft()
        passage, rest = ids[: min(size, left)], ids[size:]
        if len(passage) >= SHORTEST:
            found.append(passage)
            left -= len(passage)
        if len(rest) >= SHORTEST:
            waiting.append(rest)
    if not found:
        raise BadInput(f"{documents.name} has no document of {SHORTEST} tokens; give longer calibration text")
    return found
