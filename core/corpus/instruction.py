"""A conversation as token ids of which only the answers are learned, by the tokenizer's own chat template.

Where the answers stand is found by rendering the conversation bit by bit: what the template writes for the turns
before an answer, with the opening of an answer, must be how it begins to write the answered conversation, and that how
it begins to write the whole. A template that rewrites earlier turns (drops what a model thought, say) fails this and is
refused: its marks would be in the wrong place. Knows the tokenizer and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.corpus.rows import Message
from core.errors import BadInput


def answers(
    messages: Sequence[Message], tokenizer: Any, *, where: str
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """[T] ids of the conversation, and whether each token belongs to an answer.

    An answer goes from behind its opening to the token that ends it, that included. ``where`` names the row in
    messages. Raises ``BadInput`` for a tokenizer without a template, one that does not say where its tokens stand, a
    conversation that the template refuses, and a template that rewrites earlier turns.
    """
    if not tokenizer.chat_template:
        raise BadInput(
            "this model's tokenizer has no chat template, so it is not known how a conversation is written; use an "
            "instruction-tuned model, or give rows of text"
        )
    if not tokenizer.is_fast:
        raise BadInput(
            f"{type(tokenizer).__name__} does not say where its tokens stand in the text, so answers cannot be told "
            "from prompts; use a model that comes with a tokenizer.json"
        )
    whole, spans = _answer_spans(messages, tokenizer, where)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    learned = np.zeros(len(starts), dtype=np.bool_)
    for begin, end in spans:  # a token that also holds a piece of the prompt is not learned
        learned |= (starts >= begin) & (ends <= end) & (starts < ends)
    return np.array(encoded["input_ids"], dtype=np.int32), learned


def _answer_spans(
    messages: Sequence[Message], tokenizer: Any, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and begin and end of each answer in it."""
    whole = _rendered(messages, tokenizer, where)
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        asked = _rendered(messages[:turn], tokenizer, where, opening=True)
        last = turn + 1 == len(messages)
        answered = whole if last else _rendered(messages[: turn + 1], tokenizer, where)
        if not (answered.startswith(asked) and whole.startswith(answered)):
            raise BadInput(
                f"{where}: the chat template writes the turns before answer {len(spans) + 1} differently once more "
                "turns follow, so the answer's place is not certain; give conversations of one question and one answer"
            )
        spans.append((len(asked), _end_of_answer(answered, len(asked), tokenizer.eos_token)))
    return whole, spans


def _end_of_answer(answered: str, begin: int, eos: str | None) -> int:
    """Behind the token that ends the answer; a line break that the template writes after it is not the model's."""
    at = answered.rfind(eos, begin) if eos else -1
    return len(answered) if at < 0 else at + len(eos or "")


def _rendered(messages: Sequence[Message], tokenizer: Any, where: str, *, opening: bool = False) -> str:
    from jinja2 import TemplateError

    turns = [message._asdict() for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opening)
    except TemplateError as error:
        raise BadInput(
            f"{where}: the chat template refuses it ({error}); change or leave out this row"
        ) from None
    return str(text)
