"""What a batch says is learned, against a slow reading of the same texts; nothing twice, nothing given, no padding."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from tokenizers import processors

from core.corpus.batches import IGNORE, order, tokenized
from core.corpus.rows import Row, Rows
from core.errors import BadInput
from tests.tiny import CORPUS, tiny_model

TEXTS = Rows("texts", "text", tuple(Row(text=text * n) for n in (1, 3) for text in CORPUS))
WINDOW = 32


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model("llama").tokenizer


def with_bos(tokenizer):
    """The same tokenizer, putting its beginning-of-sequence token before each text, as Llama's does."""
    copied = deepcopy(tokenizer)
    copied.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    return copied


def learned_pairs(data) -> list[tuple[int, int]]:
    """(token, the next one) at every position that is learned."""
    batch = data.batch(range(data.n_rows))
    at = batch.targets_BP != IGNORE
    return list(zip(batch.ids_BP[at].tolist(), batch.targets_BP[at].tolist(), strict=True))


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_each_token_but_the_first_is_learned_once_behind_the_one_before_it(tokenizer, packing):
    data = tokenized(TEXTS, tokenizer, window=WINDOW, packing=packing)
    bodies = [tokenizer(row.text)["input_ids"] for row in TEXTS.rows]
    assert max(map(len, bodies)) > 2 * WINDOW, "or nothing would go on in another text"
    told = [pair for body in bodies for pair in pairwise(body)]
    assert sorted(learned_pairs(data)) == sorted(told)
    assert data.n_targets == len(told) == data.batch(range(data.n_rows)).n_targets


def test_with_a_special_token_before_it_the_first_is_learned_too(tokenizer):
    data = tokenized(TEXTS, with_bos(tokenizer), window=WINDOW)
    bodies = [tokenizer(row.text)["input_ids"] for row in TEXTS.rows]
    told = [pair for body in bodies for pair in zip([0, *body[:-1]], body, strict=True)]
    assert sorted(learned_pairs(data)) == sorted(told)
    assert all(data.encoded.ids_T[start] == 0 for start in data.encoded.bounds_S1[:-1])


def test_a_packed_row_tells_its_texts_apart(tokenizer):
    data = tokenized(TEXTS, tokenizer, window=WINDOW)
    batch = data.batch(range(data.n_rows))
    assert data.n_rows < len(data.encoded.row_S)
    assert batch.n_tokens == data.n_tokens
    for segments, positions, targets in zip(
        batch.segments_BP, batch.positions_BP, batch.targets_BP, strict=True
    ):
        for number in range(1, int(segments.max()) + 1):
            (places,) = torch.where(segments == number)
            assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
            assert positions[places].tolist() == list(range(len(places)))
            assert targets[places[-1]] == IGNORE
        assert (targets[segments == 0] == IGNORE).all()
    assert data.sources(0) == tuple(dict.fromkeys(data.encoded.row_S[data.layout.texts(0)].tolist()))


def test_masks_follow_from_the_texts(tokenizer):
    packed, padded = (tokenized(TEXTS, tokenizer, window=WINDOW, packing=how) for how in ("packed", "padded"))
    row = next(row for row in range(packed.n_rows) if len(packed.layout.texts(row)) > 1)
    batch = packed.batch([row])
    mask_PP = batch.attention_mask(torch.float32)[0, 0]
    segments = batch.segments_BP[0]
    for query in range(len(segments)):
        for key in range(len(segments)):
            seen = key <= query and segments[key] == segments[query]
            assert mask_PP[query, key] == (0 if seen else torch.finfo(torch.float32).min)
    whole = [row for row in range(padded.n_rows) if padded.length(row) == WINDOW][:2]
    assert padded.batch(whole).attention_mask(torch.float32) is None
    short = min(range(padded.n_rows), key=padded.length)
    two = padded.batch([whole[0], short]).attention_mask(torch.float32)
    assert two.sum(dim=1).tolist() == [WINDOW, padded.length(short)]


def test_a_batch_is_what_its_rows_are_and_hashes_say_so(tokenizer):
    data, again = (tokenized(TEXTS, tokenizer, window=WINDOW) for _ in range(2))
    assert data.fingerprint == again.fingerprint
    assert (
        data.batch([0, 1]).content_hash == again.batch([0, 1]).content_hash != data.batch([1, 0]).content_hash
    )
    assert len({data.row_hash(row) for row in range(data.n_rows)}) == data.n_rows
    other = tokenized(TEXTS, tokenizer, window=WINDOW, packing="padded")
    assert other.fingerprint != data.fingerprint
    assert data.batch([2]).rows_B.tolist() == [2]


def test_the_order_is_a_permutation_of_its_own_for_every_epoch():
    assert sorted(order(100, 0, 7)) == list(range(100))
    assert order(6, 0, 0).tolist() == [3, 2, 1, 0, 4, 5], (
        "the same on every machine, or no training could be repeated"
    )
    assert len({tuple(order(50, epoch, seed)) for epoch in (0, 1) for seed in (0, 1)}) == 4


def test_labels_are_numbers_of_the_training_classes():
    bert = tiny_model("bert").tokenizer
    rows = Rows("set", "labelled", (Row(text="one two", label="b"), Row(text="three", label="a")))
    data = tokenized(rows, bert, window=16)
    batch = data.batch([0, 1])
    assert batch.labels_B.tolist() == [1, 0]
    assert batch.n_targets == 0
    assert batch.types_BP is None
    assert (
        batch.ids_BP[1].tolist()
        == bert("three", padding="max_length", max_length=batch.ids_BP.shape[1])["input_ids"]
    )
    more = tokenized(rows, bert, window=16, classes=("a", "b", "c"))
    assert more.classes == ("a", "b", "c")
    with pytest.raises(BadInput, match=r"1 of 2 rows of set have a label that no training row has: 'b'"):
        tokenized(rows, bert, window=16, classes=("a",))


def test_the_second_text_of_a_row_is_told_from_the_first():
    bert = deepcopy(tiny_model("bert").tokenizer)
    bert.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = Rows(
        "set",
        "labelled",
        (Row(text="one", second="two three", label="a"), Row(text="two", second="one", label="b")),
    )
    batch = tokenized(rows, bert, window=32).batch([0, 1])
    expected = bert(["one", "two"], ["two three", "one"], padding=True, return_tensors="pt")
    inputs = batch.inputs("encoder")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(inputs[name], expected[name])


def test_scored_pairs_are_first_texts_and_then_second_texts():
    bert = tiny_model("bert").tokenizer
    rows = Rows("set", "pairs", tuple(Row(text=f"a {n}", second=f"b b {n}", score=n / 2) for n in range(3)))
    data = tokenized(rows, bert, window=16)
    batch = data.batch([2, 0])
    assert data.n_rows == 3
    assert batch.labels_B.tolist() == [1.0, 0.0]
    said = bert.batch_decode(batch.ids_BP, skip_special_tokens=True)
    assert said == [
        bert.decode(bert(text)["input_ids"], skip_special_tokens=True)
        for text in ("a 2", "a 0", "b b 2", "b b 0")
    ]


def test_rows_over_the_window_are_counted_before_anything_is_trained():
    bert = tiny_model("bert").tokenizer
    rows = Rows("set", "labelled", tuple(Row(text="one " * n, label=str(n % 2)) for n in (1, 2, 30, 40)))
    with pytest.raises(
        BadInput, match=r"2 of 4 rows of set are longer than the window of 16 .* has \d+, the first is row 3"
    ):
        tokenized(rows, bert, window=16)
    cut = tokenized(rows, bert, window=16, too_long="cut")
    assert cut.n_cut == 2
    for row in (2, 3):
        expected = bert(rows.rows[row].text, truncation=True, max_length=16)["input_ids"]
        assert cut.batch([row]).ids_BP[0].tolist() == expected, "the end goes, what ends a text stays"
    with pytest.raises(BadInput, match="no room for text"):
        tokenized(TEXTS, bert, window=3)
