"""What is wrong with a text before any model reads it: said twice, in the wrong script, in pieces of characters, one kind only.

Strings and token ids in, numbers out; knows tokenizers and no models. Legend: ``B`` windows, ``P`` positions.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.text.domains import documents_by_domain

Ints = NDArray[np.int64]
SHINGLE_WORDS = 5
"""Consecutive words that make one shingle of a document (Broder 1997)."""
SHINGLE_TOKENS = 8
"""Consecutive tokens of a window that are unlikely to be met twice by chance."""
COMMON = 64
"""Shingles that more documents have are boilerplate and find no pairs."""
BUCKETS = 1 << 14
LEARNED_BYTES = 65_536
"""Text of each kind that the nearest-kind rule is made of."""
FOREIGN = 0.5
"""A document with more of its letters in another script than Latin is named by that script."""


def duplicates(texts: Sequence[str], *, near: float) -> dict[int, tuple[int, float]]:
    """Document → the first earlier one it repeats, with their Jaccard similarity of word shingles, at least ``near``.

    A repeat of blanks and cases apart is exact: similarity 1.
    """
    shingles = [_shingles(text) for text in texts]
    holders: dict[int, list[int]] = defaultdict(list)
    found: dict[int, tuple[int, float]] = {}
    for at, mine in enumerate(shingles):
        shared = Counter(other for shingle in mine for other in holders[shingle])
        for other in sorted(shared):
            alike = shared[other] / len(mine | shingles[other])
            if alike >= near and other not in found:
                found[at] = (other, alike)
                break
        for shingle in mine:
            if len(holders[shingle]) < COMMON:
                holders[shingle].append(at)
    return found


def _shingles(text: str) -> frozenset[int]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    n = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(n))


def repeated(windows_BP: Ints) -> NDArray[np.float64]:
    """[B]: share of a window's runs of ``SHINGLE_TOKENS`` tokens that an earlier window has, or the window itself earlier."""
    seen: set[bytes] = set()
    shares = np.zeros(len(windows_BP))
    width = min(SHINGLE_TOKENS, windows_BP.shape[1])
    for at, window_P in enumerate(windows_BP):
        runs = [run.tobytes() for run in np.lib.stride_tricks.sliding_window_view(window_P, width)]
        shares[at] = sum(run in seen for run in runs) / len(runs)
        seen.update(runs)
    return shares


def scripts(text: str) -> Counter[str]:
    """Letters of a text by their script, as Unicode names them: ``LATIN``, ``CYRILLIC``, ``CJK``."""
    found: Counter[str] = Counter()
    for character, times in Counter(text).items():
        if character.isalpha():
            found[_script(character)] += times
    return found


@cache
def _script(character: str) -> str:
    return unicodedata.name(character, "UNNAMED").split()[0].split("-")[0]


def broken_ids(tokenizer: Any, ids: Ints) -> tuple[set[int], set[int]]:
    """Of these ids: those that stand for a piece of a character, and the unknown token where it means just that."""
    distinct = np.unique(ids).tolist()
    special = set(tokenizer.all_special_ids)
    pieces = {i for i in distinct if i not in special and "�" in tokenizer.decode([i])}
    boundary = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    unknown = tokenizer.unk_token_id
    return pieces, {unknown} & set(distinct) if unknown not in boundary else set()


def kind_of(text: str) -> str:
    """The nearest of the embedded kinds of text (``core.text.domains``) by its byte trigrams; a foreign script is its name."""
    letters = scripts(text)
    script = max(letters, key=lambda name: letters[name], default="LATIN")
    if script != "LATIN" and letters[script] > FOREIGN * letters.total():
        return script.capitalize()
    names, log_KV = _kinds()
    return names[int((log_KV @ _trigrams(text)).argmax())]


@cache
def _kinds() -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Names, and the log-probability of every trigram bucket under each: multinomial naive Bayes, one count added."""
    known = documents_by_domain(split="evaluation", limit_bytes=LEARNED_BYTES)
    counts = np.stack([_trigrams("\n".join(documents.texts)) for documents in known.values()]) + 1.0
    return tuple(known), np.log(counts / counts.sum(1, keepdims=True))


def _trigrams(text: str) -> NDArray[np.float64]:
    """[BUCKETS]: how often each byte trigram occurs, hashed."""
    codes = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    hashed = (codes[:-2] * 65_599 + codes[1:-1] * 263 + codes[2:]) % BUCKETS
    return np.bincount(hashed, minlength=BUCKETS).astype(np.float64)
