"""What kind of token each predicted token is: common or rare, part of a word, seen before, early or late, easy or hard.

Token ids and their strings in, names of kinds out; knows no model. Every token is in exactly one class of each kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
COMMON, MIDDLE = 0.5, 0.8
"""The most frequent tokens that make up half of the text are common; those up to 80 % of it are middling."""
EDGES = (8, 32, 128, 512)
"""Positions at which a band of context ends."""
NATS = (0.1, 1.0, 4.0)
"""Surprisals of the teacher at which a band of difficulty ends: about 90 %, 37 % and 2 % of probability."""
KINDS = {
    "frequency": "How frequent the token is in this text",
    "form": "What it is made of",
    "repeated": "Whether the text already showed it",
    "position": "Tokens before it",
    "difficulty": "How hard the teacher finds it",
}


def frequency_classes(ids: Sequence[Sequence[int]]) -> dict[int, str]:
    """Token id → common, middling or rare, by shares of the whole text."""
    counts = Counter(id_ for one in ids for id_ in one)
    total, so_far = sum(counts.values()), 0
    found = {}
    for id_, n in counts.most_common():
        share = so_far / total
        found[id_] = "common" if share < COMMON else "middling" if share < MIDDLE else "rare"
        so_far += n
    return found


def form_of(token: str, before: str) -> str:
    """A word's beginning, its continuation, a number, punctuation, space, or another sign.

    Both are strings as a reader sees them; a word goes on where no space parts a letter from the letter before it.
    """
    bare = token.strip()
    if not bare:
        return "space"
    if bare.isdigit():
        return "number"
    if any(character.isalpha() for character in bare):
        goes_on = token.startswith("##") or (token[0].isalpha() and before[-1:].isalpha())
        return "word, continued" if goes_on else "word"
    return "punctuation" if bare.isascii() else "other sign"


def repeated_classes(ids: Sequence[int]) -> list[str]:
    """Per token but the first: does a copy of it follow an earlier copy of the token before it, or stand anywhere before."""
    pairs: set[tuple[int, int]] = set()
    seen: set[int] = {ids[0]}
    found = []
    for before, now in pairwise(ids):
        found.append(
            "after the same token" if (before, now) in pairs else "seen before" if now in seen else "new"
        )
        pairs.add((before, now))
        seen.add(now)
    return found


def banded(values: Sequence[float], edges: Sequence[float], unit: str = "") -> list[str]:
    """The band of each value, e.g. ``8–32``; the last is open."""
    names = [f"under {edges[0]:g}{unit}"]
    names += [f"{low:g}–{high:g}{unit}" for low, high in pairwise(edges)]
    names.append(f"{edges[-1]:g}{unit} and more")
    return [names[at] for at in np.searchsorted(edges, values, side="right")]
