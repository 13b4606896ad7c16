"""Text classifiers are opened with their head proved: what pools, what answers, and how a causal one finds the end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers

from core.errors import AnatomyMismatch, CannotOpen
from core.models.anatomy_verify import verify_anatomy
from core.models.open import open_model
from core.models.readout import classify
from core.models.sizes import component_of
from core.types import ModelRef
from tests.tiny import CLASSIFIERS, D_MODEL, tiny_folder, tiny_model

CHECK = "classifier on the last layer gives the logits"


@pytest.mark.parametrize(
    ("family", "classifier", "pooler"),
    [
        ("bert_classifier", "classifier", "bert.pooler"),
        ("electra_classifier", "classifier", None),
        ("llama_classifier", "score", None),
    ],
)
def test_the_head_is_found_and_proved(family: str, classifier: str, pooler: str | None) -> None:
    loaded = tiny_model(family)
    anatomy = loaded.anatomy
    assert (anatomy.family, anatomy.classifier, anatomy.pooler) == ("classifier", classifier, pooler)
    assert anatomy.unembedding is None
    assert anatomy.causal == (family == "llama_classifier")
    assert loaded.checks[CHECK] == 0
    assert loaded.offers == {"classifier", "text", "heads", "dense"}
    head = {n for n, _ in loaded.model.named_parameters() if component_of(anatomy, n) == "head"}
    assert {n.rpartition(".")[0].split(".")[0] for n in head} == {classifier, *(["bert"] if pooler else [])}


def test_a_wrong_pooler_is_refused() -> None:
    loaded = tiny_model("bert_classifier")
    wrong = dataclasses.replace(
        loaded.anatomy, pooler=f"{loaded.anatomy.blocks[-1].path}.attention.output.dense"
    )
    with pytest.raises(AnatomyMismatch, match=CHECK):
        verify_anatomy(loaded.model, wrong)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_padded_batch_is_read_as_the_model_reads_it(family: str) -> None:
    loaded = tiny_model(family)
    assert loaded.runs_batches
    ids_BP = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
    mask_BP = (ids_BP != 0).long()
    with torch.inference_mode():
        answer = loaded.model(input_ids=ids_BP, attention_mask=mask_BP, output_hidden_states=True)
        if family == "llama_classifier":  # the last hidden state that transformers gives is normed already
            short = loaded.model(input_ids=ids_BP[1:, :3])
            torch.testing.assert_close(answer.logits[1:], short.logits)
            return
        logits = classify(loaded.model, loaded.anatomy, answer.hidden_states[-1], ids_BP)
    assert torch.equal(logits, answer.logits)


def test_a_causal_classifier_without_padding_answers_one_text_at_a_time(tmp_path: Path) -> None:
    folder = tiny_folder("llama_classifier", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    loaded = open_model(ModelRef(str(folder)))
    assert loaded.checks[CHECK] == 0
    assert not loaded.runs_batches


def test_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    """The weights of an encoder under a classifier's name: the head would be drawn at random."""
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=D_MODEL, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**values, "architectures": ["BertForSequenceClassification"]})
    )
    with pytest.raises(
        CannotOpen, match=r"2 weights of BertForSequenceClassification are missing.*classifier"
    ):
        open_model(ModelRef(str(tmp_path)))
