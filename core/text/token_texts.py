"""What a token looks like to a reader, for byte-level, SentencePiece and WordPiece vocabularies.

Knows tokenizers only: no model, no prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    r"""What each token looks like to a reader: byte-level and SentencePiece spellings undone.

    ``Ġthe`` and ``▁the`` give `` the``. A token that is only a part of a multi-byte character shows its bytes, e.g.
    ``\xf0\x9f``. WordPiece's ``##`` stays: it says that a word goes on.
    """
    distinct = list(dict.fromkeys(ids))  # a lens names some 12,000 tokens, of which few hundred differ
    special = set(tokenizer.all_special_tokens)
    byte_level = is_byte_level(tokenizer)
    texts = {
        id_: f"<unused {id_}>"  # vocabularies are padded: the model can predict rows the tokenizer has no name for
        if token is None
        else token
        if token in special
        else _readable(token, byte_level)
        for id_, token in zip(distinct, tokenizer.convert_ids_to_tokens(distinct), strict=True)
    }
    return tuple(texts[id_] for id_ in ids)


def token_named(tokenizer: Any, text: str) -> int | None:
    """The id of the one token that ``token_texts`` shows as ``text``; None when there is none."""
    id_of = tokenizer.backend_tokenizer.token_to_id
    spelling = text.replace(" ", "▁")
    if is_byte_level(tokenizer):
        spelling = "".join(_character_of_byte()[byte] for byte in text.encode())
    found: int | None = id_of(spelling)
    return id_of(text) if found is None else found


def _readable(token: str, byte_level: bool) -> str:
    if not byte_level:
        return _BYTE_FALLBACK.sub(lambda match: rf"\x{match[1].lower()}", token).replace("▁", " ")
    table = _byte_of_character()
    if any(character not in table for character in token):
        return token  # an added token, stored as plain text
    return bytes(table[character] for character in token).decode(errors="backslashreplace")


def is_byte_level(tokenizer: Any) -> bool:
    """Whether each character of a token stands for one byte (GPT-2's alphabet)."""
    return "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


@cache
def _character_of_byte() -> dict[int, str]:
    return {byte: character for character, byte in _byte_of_character().items()}
