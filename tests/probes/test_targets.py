"""What a user types as a token: found by how it looks, refused with its pieces."""

from __future__ import annotations

import pytest
import torch

from core.errors import BadInput
from core.probes._targets import named, resolve_distractor, resolve_token, spelling_note
from core.probes._tokens import token_named, token_texts
from tests.induction import induction_model
from tests.tiny import FAMILIES, tiny_model

TEXT_FAMILIES = [family for family in FAMILIES if family != "vit"]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_every_token_is_found_by_how_it_looks(family: str) -> None:
    loaded = tiny_model(family)
    ids = range(len(loaded.tokenizer))
    for id_, text in zip(ids, token_texts(loaded.tokenizer, ids), strict=True):
        if not text.startswith("\\x"):  # a part of a character has no text of its own
            assert token_named(loaded.tokenizer, text) == id_
            assert resolve_token(loaded, text).id == id_


def test_nothing_typed_is_the_top_prediction() -> None:
    loaded = tiny_model("llama")
    logits_V = torch.zeros(loaded.anatomy.vocab_size)
    logits_V[42] = 1
    assert resolve_token(loaded, "", logits_V=logits_V) == named(loaded, 42)
    with pytest.raises(BadInput, match="no target was given; type one token"):
        resolve_token(loaded, "")


def test_a_space_makes_another_token() -> None:
    loaded = tiny_model("llama")
    spaced = resolve_token(loaded, " the")
    assert spaced.text == " the"
    with pytest.raises(
        BadInput, match=r"target 'the' is \d tokens \('\w+' \+ .*type ' the', with a leading space"
    ):
        resolve_token(loaded, "the")


def test_text_of_many_tokens_names_its_pieces() -> None:
    with pytest.raises(
        BadInput, match=r"distractor 'zebra' is \d tokens \('z' \+ .*take its first token, 'z'"
    ):
        resolve_token(tiny_model("llama"), "zebra", role="distractor")


def test_a_word_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(BadInput, match="target 'zebra' is not in this model's vocabulary"):
        resolve_token(induction_model(40.0), "zebra")
    assert resolve_token(induction_model(40.0), "c").id == 2


def test_target_and_distractor_must_differ() -> None:
    loaded = tiny_model("llama")
    target = resolve_token(loaded, " the")
    assert resolve_distractor(loaded, "", target) is None
    with pytest.raises(BadInput, match="their difference is 0"):
        resolve_distractor(loaded, " the", target)


def test_the_other_spelling_is_pointed_out_only_when_the_model_prefers_it() -> None:
    loaded = tiny_model("llama")
    plain, spaced = resolve_token(loaded, "a"), resolve_token(loaded, " a")
    logits_V = torch.zeros(loaded.anatomy.vocab_size)
    logits_V[spaced.id] = 1
    assert "' a' a higher logit than 'a'" in spelling_note(loaded, plain, logits_V)[0]
    assert spelling_note(loaded, spaced, logits_V) == ()


def test_a_class_is_named_by_label_or_number() -> None:
    loaded = tiny_model("vit")
    assert resolve_token(loaded, "3").id == resolve_token(loaded, "LABEL_3").id == 3
    with pytest.raises(BadInput, match="no class of this model; there are 10"):
        resolve_token(loaded, "cat")
