"""The aims of text classifiers and of sentence encoders: identities on tiny models."""

import copy
from dataclasses import replace

import pytest
import torch

from core.corpus.batches import tokenized
from core.corpus.rows import Row, Rows
from core.distill.classification_objective import ClassificationObjective
from core.distill.losses.logit_gradient import Terms
from core.distill.losses.named import named
from core.distill.remembered import Remembered
from core.distill.similarity_objective import SimilarityObjective, sentence_vectors
from core.errors import CannotCompress
from core.models.embed import embed
from tests.tiny import tiny_model

TEXTS = ("the capital of France", "John gave a drink to Mary at the store", "print index")
TERMS = Terms(named("forward_kl"), 2.0, 1.0, 0.5)


def twin(loaded, *, by: float):
    """A second model whose weights are some way off; it learns."""
    found = replace(loaded, model=copy.deepcopy(loaded.model).requires_grad_(True))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw))
    return found


def labelled(loaded):
    rows = Rows("rows", "labelled", tuple(Row(text=t, label=str(i % 2)) for i, t in enumerate(TEXTS)))
    return tokenized(rows, loaded.tokenizer, window=32).batch([2, 0, 1])


def pairs(loaded):
    rows = tuple(Row(text=TEXTS[i], second=TEXTS[(i + 1) % 3], score=i / 2) for i in range(3))
    return tokenized(Rows("pairs", "pairs", rows), loaded.tokenizer, window=32).batch([0, 2])


def gradient_size(loss, loaded):
    found = torch.autograd.grad(loss, list(loaded.model.parameters()), allow_unused=True)
    return max(float(gradient.abs().max()) for gradient in found if gradient is not None)


@pytest.mark.parametrize("family", ["bert_classifier", "llama_classifier"])
def test_class_distributions_are_matched_and_padding_has_no_say(family):
    teacher = tiny_model(family)
    batch = labelled(teacher)
    student = twin(teacher, by=0.05)
    found = ClassificationObjective(student, teacher, TERMS)(batch)
    p, q = (
        torch.cat([_logits(model, text) for text in (TEXTS[2], TEXTS[0], TEXTS[1])])
        for model in (teacher, student)
    )
    kd = 4 * torch.nn.functional.kl_div(
        (q / 2).log_softmax(-1), (p / 2).log_softmax(-1), log_target=True, reduction="sum"
    )
    assert found.n == 3
    assert found.parts["kd"] == pytest.approx(float(kd.detach()), rel=1e-3)
    assert float(found.loss.detach()) == pytest.approx(
        found.parts["kd"] + 0.5 * found.parts["task"], rel=1e-5
    )
    same = twin(teacher, by=0.0)
    equal = ClassificationObjective(same, teacher, replace(TERMS, task_weight=0.0))(batch)
    assert float(equal.loss.detach()) == pytest.approx(0, abs=1e-5)
    assert gradient_size(equal.loss, same) < 1e-4
    with torch.no_grad():
        measured = ClassificationObjective(student, teacher, TERMS).held_out(batch)
    assert measured["accuracy"] == int((q.argmax(-1) == batch.labels_B).sum())


def _logits(loaded, text):
    return loaded.model(**loaded.tokenizer(text, return_tensors="pt")).logits.float()


def test_other_classes_are_refused():
    teacher = tiny_model("bert_classifier")
    student = twin(teacher, by=0.0)
    student.model.config.id2label = {0: "no", 1: "yes", 2: "perhaps", 3: "never"}
    with pytest.raises(CannotCompress, match="tells 4 classes apart"):
        ClassificationObjective(student, teacher, TERMS)


def test_sentence_vectors_are_those_of_evaluation():
    loaded = tiny_model("bert")
    with torch.no_grad():
        found = sentence_vectors(loaded, pairs(loaded))
    expected = embed(loaded, [TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[0]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_cosines_are_matched_to_the_teachers_and_to_the_scores():
    teacher = tiny_model("bert")
    batch, student = pairs(teacher), twin(teacher, by=0.05)
    found = SimilarityObjective(student, teacher, kd_weight=2.0, task_weight=0.5)(batch)
    ours, theirs = (
        embed(model, [TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[0]]).double() for model in (student, teacher)
    )
    kd = sum(float(ours[i] @ ours[j] - theirs[i] @ theirs[j]) ** 2 for i in range(4) for j in range(4)) / 4
    task = (float(ours[0] @ ours[2]) - 0.0) ** 2 + (float(ours[1] @ ours[3]) - 1.0) ** 2
    assert found.n == 2
    assert found.parts["kd"] == pytest.approx(kd, rel=1e-3)
    assert found.parts["task"] == pytest.approx(task, rel=1e-3)
    assert float(found.loss.detach()) == pytest.approx(2 * kd + 0.5 * task, rel=1e-3)
    same = twin(teacher, by=0.0)
    equal = SimilarityObjective(same, teacher)(batch)
    assert float(equal.loss.detach()) < 1e-9
    assert gradient_size(equal.loss, same) < 1e-4
    with pytest.raises(CannotCompress, match="encoder"):
        SimilarityObjective(tiny_model("smollm"), None)


def test_a_teacher_is_asked_once_for_each_text_and_alone():
    loaded = tiny_model("bert")
    asked = []

    def ask(row):
        asked.append(row.ids_BP.shape)
        return sentence_vectors(loaded, row)

    remembered, batch = Remembered(ask), pairs(loaded)
    first = remembered(batch)
    assert torch.equal(first, remembered(batch))
    assert len(asked) == 3, "two of the four texts are the same"
    assert all(n == 1 for n, _ in asked)
    assert len({length for _, length in asked}) > 1
