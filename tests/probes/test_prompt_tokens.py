"""Tokens as a reader sees them, and the bytes they stand for."""

from __future__ import annotations

import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.probes._tokens import encode, token_texts
from core.types import Prompt
from tests.tiny import tiny_model

TEXT = "Paris costs 3 € 😀,  naïve.\n"


def test_byte_level_tokens_read_like_the_text() -> None:
    encoded = encode(tiny_model("llama"), Prompt("The capital of France"))
    assert "".join(encoded.texts) == "The capital of France"
    assert "Ġ" not in "".join(encoded.texts)


def test_a_part_of_a_character_shows_its_bytes() -> None:
    texts = encode(tiny_model("llama"), Prompt("é")).texts
    assert texts in (("\\xc3", "\\xa9"), ("é",))


def test_every_byte_has_its_character() -> None:
    """The byte alphabet must be the tokenizer's own: an identity over all 256 bytes."""
    tokenizer = tiny_model("llama").tokenizer
    for byte in range(128):
        ids = tokenizer.convert_tokens_to_ids(
            [pre_tokenizers.ByteLevel(False).pre_tokenize_str(chr(byte))[0][0]]
        )
        assert token_texts(tokenizer, ids) == (chr(byte),)


@given(st.text(min_size=1, max_size=40).filter(str.strip))
@settings(max_examples=60, deadline=None)
def test_every_byte_of_a_text_is_counted_once(text: str) -> None:
    text = text.encode("utf-8", errors="replace").decode()
    for family in ("llama", "bert"):
        encoded = encode(tiny_model(family), Prompt(text))
        if (
            family == "llama" or encoded.n_tokens > 2
        ):  # WordPiece may drop everything, e.g. control characters
            assert sum(encoded.n_bytes) == len(text.encode())
        assert min(encoded.n_bytes) >= 0


def test_byte_level_tokens_know_their_share_of_a_character() -> None:
    loaded = tiny_model("llama")
    encoded = encode(loaded, Prompt(TEXT))
    spelled = loaded.tokenizer.convert_ids_to_tokens(list(encoded.ids))
    assert list(encoded.n_bytes) == [len(token) for token in spelled]


def test_special_tokens_stand_for_no_bytes() -> None:
    encoded = encode(tiny_model("bert"), Prompt("water boils", "paris"))
    assert [
        n for n, text in zip(encoded.n_bytes, encoded.texts, strict=True) if text in ("[CLS]", "[SEP]")
    ] == [0] * 3
    assert sum(encoded.n_bytes) == len("water boils") + len("paris")


def test_sentencepiece_spelling_is_undone() -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "<0xE2>": 2, "re": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert token_texts(fast, [1, 3, 2]) == (" the", "re", "\\xe2")


def test_a_row_without_a_name_is_called_unused() -> None:
    loaded = tiny_model("llama")
    nameless = len(loaded.tokenizer)
    assert nameless < loaded.anatomy.vocab_size
    assert token_texts(loaded.tokenizer, [nameless]) == (f"<unused {nameless}>",)
