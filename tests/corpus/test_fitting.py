"""Packed texts give what they give alone, in every family: outputs, loss and gradient; what mixes them is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers

from core.corpus.batches import IGNORE, Batch, tokenized
from core.corpus.fitting import fitted
from core.corpus.rows import Row, Rows
from core.errors import BadInput
from core.models.anatomy_find import find_anatomy
from tests.tiny import CORPUS, DECODERS, tiny_model

ROWS = Rows("texts", "text", tuple(Row(text=text[:n]) for text in CORPUS for n in (300, 60, 30)))
WINDOW = 72
"""Longer than the sliding windows of the tiny models, shorter than some texts."""


def alone(loaded, data) -> list[torch.Tensor]:
    """[P, V] outputs of each text by itself."""
    bounds = data.encoded.bounds_S1
    each = (torch.from_numpy(data.encoded.ids_T[a:b].astype(np.int64)) for a, b in pairwise(bounds))
    with torch.inference_mode():
        return [loaded.model(input_ids=ids[None])[0][0] for ids in each]


@pytest.mark.parametrize("family", [*DECODERS, "llama4", "deepseek_v3", "bert"])
def test_packed_equals_unpacked(family):
    loaded = tiny_model(family)
    data = fitted(tokenized(ROWS, loaded.tokenizer, window=WINDOW), loaded)
    batch = data.batch(range(data.n_rows))
    assert batch.segments_BP.max() > 1
    with torch.inference_mode():
        together = loaded.model(**batch.inputs(loaded.family))[0]
    expected = alone(loaded, data)
    for row in range(data.n_rows):
        for number, text in enumerate(data.layout.texts(row), start=1):
            found = together[row, batch.segments_BP[row] == number]
            assert (found - expected[text]).abs().max() <= 1e-5 * expected[text].abs().max()


def test_a_model_that_ignores_positions_is_given_a_mask():
    loaded = tiny_model("opt")
    data = tokenized(ROWS, loaded.tokenizer, window=WINDOW)
    assert not data.by_mask
    assert fitted(data, loaded).by_mask
    assert not fitted(data, tiny_model("llama")).by_mask


@pytest.mark.parametrize("family", ["jamba", "gpt_oss"])
def test_a_model_that_mixes_the_texts_of_a_row_is_refused(family):
    loaded = tiny_model(family)
    with pytest.raises(BadInput, match="lets texts that share a row see each other; choose packing=padded"):
        fitted(tokenized(ROWS, loaded.tokenizer, window=WINDOW), loaded)
    padded = tokenized(ROWS, loaded.tokenizer, window=WINDOW, packing="padded")
    batch = fitted(padded, loaded).batch(range(padded.n_rows))
    with torch.inference_mode():
        together = loaded.model(**batch.inputs("decoder")).logits
    for row, expected in enumerate(alone(loaded, padded)):
        assert torch.allclose(together[row, : len(expected)], expected, atol=1e-4)


def test_the_gradient_of_packed_rows_is_that_of_single_texts():
    loaded = tiny_model("llama")
    packed, padded = (
        tokenized(ROWS, loaded.tokenizer, window=WINDOW, packing=how) for how in ("packed", "padded")
    )
    weight = loaded.model.model.layers[0].mlp.up_proj.weight

    def gradient(data):
        batch = data.batch(range(data.n_rows))
        with torch.enable_grad():
            weight.requires_grad_(True)
            logits = loaded.model(**batch.inputs("decoder")).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch.targets_BP.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            (found,) = torch.autograd.grad(loss, weight)
            weight.requires_grad_(False)
        return loss.item(), found

    (one, first), (two, second) = gradient(packed), gradient(padded)
    assert one == pytest.approx(two, rel=1e-5)
    assert (first - second).norm() <= 1e-5 * second.norm()


def test_what_the_model_cannot_read_is_refused():
    loaded = tiny_model("llama")
    long = Rows("long", "text", (Row(text=CORPUS[0] * 20),))
    with pytest.raises(BadInput, match="do not fit the context of 256"):
        fitted(tokenized(long, loaded.tokenizer, window=512), loaded)
    data = tokenized(ROWS, loaded.tokenizer, window=WINDOW)
    strange = replace(data.encoded, ids_T=data.encoded.ids_T + 500)
    with pytest.raises(BadInput, match="use the tokenizer of this model"):
        fitted(replace(data, encoded=strange), loaded)


def test_an_encoder_that_counts_from_behind_its_padding_gives_what_it_gives_alone():
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RobertaModel(config).eval()
    assert find_anatomy(model).context_length == 18, "positions 0 and 1 are no token's"
    segments = torch.tensor([[1] * 18, [1] * 5 + [0] * 13])
    ids = torch.where(segments > 0, torch.arange(5, 23), 1)
    batch = Batch(
        ids, segments, torch.arange(18).expand(2, -1), torch.full_like(ids, IGNORE), torch.arange(2)
    )
    with torch.inference_mode():
        together = model(**batch.inputs("encoder"))[0]
        for row, length in enumerate((18, 5)):
            expected = model(input_ids=ids[row : row + 1, :length])[0][0]
            assert (together[row, :length] - expected).abs().max() <= 1e-5 * expected.abs().max()
