"""Windows and bytes: every token scored once with enough context, every byte counted once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import CannotMeasure
from core.text.windows import adds_bos, encode_document, sliding_windows
from tests.tiny import tiny_model


@given(
    n=st.integers(0, 400),
    first=st.integers(1, 4),
    window=st.integers(5, 64),
    data=st.data(),
)
def test_every_token_is_scored_once_with_its_promised_context(n: int, first: int, window: int, data: Any):
    stride = data.draw(st.integers(1, window - 1))
    windows = sliding_windows(n, first, window=window, stride=stride)
    scored = [token for w in windows for token in range(w.first, w.end)]
    assert scored == list(range(first, n))
    for w in windows:
        assert 0 <= w.begin < w.first < w.end <= n
        assert w.end - w.begin <= window
        # context is cut only to keep the window's size, and never below window - stride
        assert w.begin == 0 or w.end - w.begin == window
        assert w.begin == 0 or w.first - w.begin >= window - stride


@dataclass
class Characters:
    """A tokenizer in ten lines: one token per UTF-8 byte, as byte-level tokenizers do with rare characters."""

    bos_token_id: int | None
    puts_bos: bool
    is_fast: bool = True

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = list(text.encode())
        offsets = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
        bos = [self.bos_token_id] if add_special_tokens and self.puts_bos else []
        return {"input_ids": bos + ids, "offset_mapping": [(0, 0)] * len(bos) + offsets}


class TestBytes:
    @given(st.text(st.characters(codec="utf-8"), max_size=30), st.integers(1, 60))
    def test_with_bos_bytes_are_those_of_the_kept_tokens(self, text: str, limit: int):
        encoded = encode_document(Characters(300, puts_bos=True), text, max_tokens=limit)
        assert encoded.has_bos
        assert encoded.n_scored == encoded.n_bytes == len(encoded.ids) - 1
        assert (
            bytes(encoded.ids[1:].tolist()).decode() == text[: len(bytes(encoded.ids[1:].tolist()).decode())]
        )

    @given(st.text(st.characters(codec="utf-8"), max_size=30), st.integers(1, 60))
    def test_without_bos_the_first_character_is_neither_scored_nor_counted(self, text: str, limit: int):
        encoded = encode_document(Characters(300, puts_bos=False), text, max_tokens=limit)
        scored = bytes(encoded.ids[encoded.first_scored :].tolist())
        assert encoded.n_bytes == len(scored) == encoded.n_scored
        scored.decode()  # whole characters only: never the tail of one whose head had no context
        if encoded.n_scored:
            assert encoded.first_scored == len(text[0].encode())

    def test_a_real_byte_level_tokenizer(self):
        tokenizer = tiny_model("llama").tokenizer
        text = "naïve 日本 🙂 text\n"
        encoded = encode_document(tokenizer, text, max_tokens=1000)
        kept = tokenizer.decode(encoded.ids[encoded.first_scored :].tolist())
        assert len(encoded.ids) > len(text), "the emoji and the ideographs take several tokens each"
        assert encoded.n_bytes == len(kept.encode())
        for limit in range(2, len(encoded.ids)):
            cut = encode_document(tokenizer, text, max_tokens=limit)
            assert "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(cut.ids[cut.first_scored :].tolist())
            assert cut.n_bytes == len(tokenizer.decode(cut.ids[cut.first_scored :].tolist()).encode())

    def test_nothing_to_score(self):
        for text in ("", "a"):
            encoded = encode_document(Characters(None, puts_bos=False), text, max_tokens=10)
            assert (encoded.n_scored, encoded.n_bytes) == (0, 0)

    def test_cutting_tokens_never_changes_the_ones_kept(self):
        tokenizer = tiny_model("llama").tokenizer
        text = "The capital of France is Paris. " * 5
        whole = encode_document(tokenizer, text, max_tokens=10_000).ids
        assert np.array_equal(encode_document(tokenizer, text, max_tokens=20).ids, whole[:20])


def test_bos_only_where_the_tokenizer_puts_it():
    assert adds_bos(Characters(300, puts_bos=True))
    assert not adds_bos(Characters(300, puts_bos=False))
    assert not adds_bos(Characters(None, puts_bos=False))


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(CannotMeasure, match=r"use a model that comes with a tokenizer\.json"):
        encode_document(Characters(None, puts_bos=False, is_fast=False), "text", max_tokens=10)
