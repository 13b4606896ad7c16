"""What makes two sets of documents disjoint: a name's hash decides its part, a long paragraph counts once."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["evaluation", "calibration", "train"]
MIN_SHARED = 80
"""Characters from which on a paragraph found in two documents counts as shared text."""


def half(key: str) -> Split:
    """Which half the document with this key belongs to: the parity of its hash, nothing else."""
    return "evaluation" if digest(key)[0] % 2 == 0 else "calibration"


def paragraphs(text: str) -> list[str]:
    """The blank-line separated blocks of a text, in order, without outer blank lines."""
    blocks: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return ["\n".join(block) for block in blocks if block]


def long_paragraphs(text: str) -> set[bytes]:
    """Hashes of the paragraphs that are long enough to matter, blind to spaces and line breaks."""
    flat = (" ".join(paragraph.split()) for paragraph in paragraphs(text))
    return {digest(paragraph) for paragraph in flat if len(paragraph) >= MIN_SHARED}


def digest(text: str) -> bytes:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
