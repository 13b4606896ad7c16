"""From what a user types to the token (or class) a probe speaks of: target, distractor, label.

A token is named by how it is shown (``_tokens.token_texts``): `` Paris`` with its space is another token than
``Paris``. Nothing typed means the model's own top prediction. It knows no probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import BadInput, NeedsInput
from core.probes._tokens import token_named, token_texts

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


@dataclass(frozen=True)
class Token:
    """One row of the unembedding: its id, and what a reader sees of it."""

    id: int
    text: str


def resolve_token(
    loaded: LoadedModel, text: str, *, role: str = "target", logits_V: Tensor | None = None
) -> Token:
    """The one token that reads as ``text``; for empty text the top prediction of ``logits_V``.

    For a classifier the class of that name or number. ``role`` is the setting's name in messages. Raises
    ``BadInput`` for empty text without logits, for text of more than one token (naming the pieces), and for text
    outside the vocabulary.
    """
    if not text:
        if logits_V is None:
            raise NeedsInput(f"no {role} was given; type one token, e.g. ' Paris' with its leading space")
        return named(loaded, int(logits_V.argmax()))
    if loaded.family in ("vision", "classifier"):
        return _class_label(loaded, text, role)
    id_ = _id_of(loaded, text, role)
    return Token(id_, token_texts(loaded.tokenizer, [id_])[0])


def resolve_distractor(loaded: LoadedModel, text: str, target: Token) -> Token | None:
    """The token that a target is compared with, or None for empty text; raises ``BadInput`` when both are the same."""
    if not text:
        return None
    distractor = resolve_token(loaded, text, role="distractor")
    if distractor.id == target.id:
        raise BadInput(
            f"target and distractor are both {target.text!r}, their difference is 0; name another distractor"
        )
    return distractor


def resolve_position(position: int, n_tokens: int) -> int:
    """A token position counted from 0, −1 meaning the last; raises ``BadInput`` with the range that exists."""
    if not -1 <= position < n_tokens:
        raise BadInput(
            f"position {position} does not exist: the prompt has {n_tokens} tokens, from 0 to {n_tokens - 1}; "
            "-1 is the last"
        )
    return position % n_tokens


def named(loaded: LoadedModel, id_: int) -> Token:
    """A row of the unembedding as a ``Token``."""
    if loaded.family in ("vision", "classifier"):
        return Token(id_, str(loaded.model.config.id2label.get(id_, id_)))
    return Token(id_, token_texts(loaded.tokenizer, [id_])[0])


def spelling_note(loaded: LoadedModel, token: Token, logits_V: Tensor) -> tuple[str, ...]:
    """Say so when the same word with or without its leading space is what the model leans to; else nothing."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        return ()
    other = token.text[1:] if token.text.startswith(" ") else f" {token.text}"
    id_ = token_named(tokenizer, other) if other.strip() else None
    if id_ is None or float(logits_V[id_]) <= float(logits_V[token.id]):
        return ()
    return (
        f"The model gives {other!r} a higher logit than {token.text!r}: they are two tokens, mind the leading space.",
    )


def _id_of(loaded: LoadedModel, text: str, role: str) -> int:
    """By its entry in the vocabulary, else by tokenizing it."""
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    known = token_named(tokenizer, text)
    if known is not None:
        return known
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    if len(ids) <= 1 or tokenizer.unk_token_id in ids:
        raise BadInput(
            f"{role} {text!r} is not in this model's vocabulary; type a token as the page shows it"
        )
    pieces = " + ".join(repr(piece) for piece in token_texts(tokenizer, ids))
    spaced = token_named(tokenizer, f" {text}")
    instead = (
        f"type {f' {text}'!r}, with a leading space, which is one"
        if spaced is not None
        else f"take its first token, {token_texts(tokenizer, ids[:1])[0]!r}, or a word that is one token "
        "(words inside a text usually begin with a space: ' word')"
    )
    raise BadInput(f"{role} {text!r} is {len(ids)} tokens ({pieces}), and a {role} is one; {instead}")


def _class_label(loaded: LoadedModel, text: str, role: str) -> Token:
    labels = {int(id_): str(label) for id_, label in loaded.model.config.id2label.items()}
    found = [id_ for id_, label in labels.items() if text in (label, str(id_))]
    if not found:
        known = ", ".join(list(labels.values())[:10])
        raise BadInput(f"{role} {text!r} is no class of this model; there are {len(labels)}: {known}")
    return Token(found[0], labels[found[0]])
