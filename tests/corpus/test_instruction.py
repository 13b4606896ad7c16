"""Only answers are learned, ends included; where their place is not certain, the row is refused."""

from __future__ import annotations

from copy import deepcopy

import pytest

from core.corpus.batches import IGNORE, tokenized
from core.corpus.instruction import answers
from core.corpus.rows import Message, Row, Rows
from core.errors import BadInput
from tests.tiny import tiny_model

CHAT = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
FORGETS = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '...' }}")
REFUSES = CHAT + "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
ONE = (Message("user", "How are you?"), Message("assistant", "Well.\n"))
TWO = (*ONE, Message("user", "And now?"), Message("assistant", "Better"))


@pytest.fixture(scope="module")
def tokenizer():
    return deepcopy(tiny_model("llama").tokenizer)


def learned(tokenizer, messages, template=CHAT) -> list[str]:
    """The runs of learned tokens, as text."""
    tokenizer.chat_template = template
    ids, marks = answers(messages, tokenizer, where="row 1")
    runs: list[list[int]] = [[]]
    for id_, mark in zip(ids.tolist(), marks.tolist(), strict=True):
        if mark:
            runs[-1].append(id_)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_an_answer_is_learned_with_its_end_and_nothing_else(tokenizer):
    assert learned(tokenizer, ONE) == ["Well.\n<|endoftext|>"]
    assert learned(tokenizer, TWO) == ["Well.\n<|endoftext|>", "Better<|endoftext|>"]
    assert learned(tokenizer, (Message("system", "Be kind."), *ONE)) == ["Well.\n<|endoftext|>"]


def test_without_a_token_that_ends_it_an_answer_goes_to_what_the_template_writes_last(tokenizer):
    assert learned(tokenizer, ONE, CHAT.replace("{{ eos_token }}", "")) == ["Well.\n\n"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    assert learned(tokenizer, ONE, FORGETS) == ["Well.\n<|endoftext|>"]
    with pytest.raises(BadInput, match="before answer 1 differently once more turns follow"):
        learned(tokenizer, TWO, FORGETS)


def test_what_the_template_refuses_is_named(tokenizer):
    with pytest.raises(BadInput, match=r"row 1: the chat template refuses it \(no system role\)"):
        learned(tokenizer, (Message("system", "Be kind."), *ONE), REFUSES)


def test_a_tokenizer_without_a_template_is_refused(tokenizer):
    with pytest.raises(BadInput, match="has no chat template"):
        learned(tokenizer, ONE, None)


def test_prompts_are_no_targets_in_a_packed_batch(tokenizer):
    tokenizer.chat_template = CHAT
    rows = Rows("talk", "instruction", (Row(messages=ONE), Row(messages=TWO)))
    data = tokenized(rows, tokenizer, window=128)
    batch = data.batch([0])
    assert (data.n_rows, int(batch.segments_BP.max())) == (1, 2)
    said = tokenizer.decode(batch.targets_BP[batch.targets_BP != IGNORE])
    assert said == "Well.\n<|endoftext|>Better<|endoftext|>Well.\n<|endoftext|>"


def test_a_prompt_that_fills_the_window_leaves_nothing_to_learn(tokenizer):
    tokenizer.chat_template = CHAT
    rows = Rows(
        "talk", "instruction", (Row(messages=ONE), Row(messages=(Message("user", "why " * 60), ONE[1])))
    )
    with pytest.raises(BadInput, match="1 of 2 rows of talk are longer than the window"):
        tokenized(rows, tokenizer, window=48)
    with pytest.raises(
        BadInput, match=r"1 of 2 conversations of talk have no answer within 48 tokens .* row 2"
    ):
        tokenized(rows, tokenizer, window=48, too_long="cut")
