"""Sentences of prose for encoders, which read sentences and not pages. Knows nothing about models.

Deliberately simple (English punctuation, no abbreviations list): a wrong cut gives a shorter sentence, and
base and variant read the same one.
"""

from __future__ import annotations

import re

from core.text.documents import paragraphs

MIN_WORDS = 5
_WORD = re.compile(r"[^\W\d_]{2,}")
_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"'(])")


def sentences(text: str, *, limit: int) -> list[str]:
    """The first ``limit`` sentences of at least ``MIN_WORDS`` words, white space made single spaces."""
    found: list[str] = []
    for paragraph in paragraphs(text):
        parts = _END.split(" ".join(paragraph.split()))
        found += [part for part in parts if len(_WORD.findall(part)) >= MIN_WORDS]
        if len(found) >= limit:
            break
    return found[:limit]
