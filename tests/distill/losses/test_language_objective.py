"""A language student's aim on tiny models: what counts, what does not, and what the student writes itself."""

from dataclasses import replace

import pytest
import torch

from core.corpus.batches import IGNORE, Batch
from core.distill.head import head_of
from core.distill.language_objective import LanguageObjective
from core.distill.live_teacher import LiveTeacher, final_hidden
from core.distill.losses.logit_gradient import Terms
from core.distill.losses.named import named
from core.distill.on_policy import OnPolicy
from core.distill.teacher_rows import top_k_of
from core.errors import CannotCompress
from core.models.open import open_model
from core.types import ModelRef
from tests.tiny import DECODERS, HEADLESS, SHIMMED, tiny_folder, tiny_model

TERMS = Terms(named("forward_kl"), 1.0, 1.0, 0.5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tied student and a teacher of other weights."""
    folder = tmp_path_factory.mktemp("pair")
    student, teacher = (
        open_model(ModelRef(str(tiny_folder("smollm", folder / str(seed), seed=seed)))) for seed in (0, 1)
    )
    student.model.requires_grad_(True)
    return student, teacher


def alone(ids: torch.Tensor, *, prompt: int = 1) -> Batch:
    """One text in a row; its first ``prompt`` tokens are given."""
    targets = torch.full_like(ids, IGNORE)
    targets[:, prompt - 1 : -1] = ids[:, prompt:]
    places = torch.arange(ids.shape[1])[None]
    return Batch(ids, torch.ones_like(ids), places, targets, torch.zeros(1, dtype=torch.long))


def text(length: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def end_to_end(first: Batch, second: Batch, *, padding: int) -> Batch:
    """Two texts in one row, and padding."""
    joined = {
        name: torch.cat((getattr(first, name), getattr(second, name)), -1)
        for name in ("ids_BP", "segments_BP", "positions_BP", "targets_BP")
    }
    joined["segments_BP"][:, first.ids_BP.shape[1] :] = 2
    filled = {
        name: torch.nn.functional.pad(tensor, (0, padding), value=IGNORE if name == "targets_BP" else 0)
        for name, tensor in joined.items()
    }
    last = joined["positions_BP"].max()
    filled["positions_BP"][:, -padding:] = torch.arange(padding) + last + 1
    return Batch(**filled, rows_B=torch.zeros(1, dtype=torch.long))


def gradients(objective, *batches):
    """Loss and gradient of the tied embedding, over all batches."""
    objective.student.model.zero_grad()
    total = sum(float(_backward(objective(batch).loss)) for batch in batches)
    return total, objective.student.model.get_input_embeddings().weight.grad.clone()


def _backward(loss):
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("family", [*DECODERS, *HEADLESS, *SHIMMED])
def test_the_head_reads_final_hidden_states_as_the_model_does(family):
    loaded, batch = tiny_model(family), alone(text(12, 0))
    with torch.no_grad():
        hidden_ND = final_hidden(loaded, batch)
        expected = loaded.model(**batch.inputs("decoder")).logits[batch.targets_BP != IGNORE]
        torch.testing.assert_close(head_of(loaded).logits(hidden_ND), expected, rtol=1e-5, atol=1e-5)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(pair):
    student, _ = pair
    objective = LanguageObjective(student, LiveTeacher(student), Terms(named("jsd")))
    loss, gradient = gradients(objective, alone(text(20, 0)))
    assert abs(loss) < 1e-5
    assert gradient.abs().max() < 1e-5


def test_texts_that_share_a_row_and_padding_count_as_if_alone(pair):
    student, teacher = pair
    objective = LanguageObjective(student, LiveTeacher(teacher), TERMS)
    first, second = alone(text(9, 0)), alone(text(14, 1), prompt=5)
    apart, apart_gradient = gradients(objective, first, second)
    packed, gradient = gradients(objective, end_to_end(first, second, padding=6))
    assert packed == pytest.approx(apart, rel=1e-5)
    torch.testing.assert_close(gradient, apart_gradient, rtol=1e-4, atol=1e-5)
    assert objective(end_to_end(first, second, padding=6)).n == 8 + 9


def test_a_prompt_is_read_but_its_tokens_are_not_learned(pair):
    student, teacher = pair
    objective = LanguageObjective(student, LiveTeacher(teacher), TERMS)
    ids = text(12, 0)
    learned = [objective(alone(ids, prompt=prompt)).parts["task"] for prompt in (1, 6)]
    with torch.no_grad():
        log_q = student.model(ids).logits[0].log_softmax(-1)
    expected = [-float(log_q[range(11), ids[0, 1:]][prompt - 1 :].sum()) for prompt in (1, 6)]
    assert learned == pytest.approx(expected, rel=1e-5)


def test_parts_are_sums_without_weights_and_kept_rows_bound_them(pair):
    student, teacher = pair

    class Kept:
        def rows(self, batch):
            unread = LiveTeacher(teacher).rows(batch)
            return top_k_of(unread.part(0, len(unread)).logits_NV, 16, 1.0)

    batch = alone(text(24, 3))
    live = LanguageObjective(student, LiveTeacher(teacher), TERMS)(batch)
    kept = LanguageObjective(student, Kept(), TERMS)(batch)
    for found in (live, kept):
        assert float(found.loss.detach()) == pytest.approx(found.parts["kd"] + 0.5 * found.parts["task"])
    assert kept.parts["task"] == pytest.approx(live.parts["task"])
    assert 0 < kept.parts["kd"] < live.parts["kd"]


def test_a_head_with_an_adapter_learns_the_same_through_itself(pair):
    student, teacher = pair
    objective = LanguageObjective(student, LiveTeacher(teacher), TERMS)
    batch = alone(text(15, 4))
    plain, gradient = gradients(objective, batch)
    hook = objective.head.module.register_forward_hook(lambda module, args, output: output)
    through, other = gradients(objective, batch)
    hook.remove()
    assert through == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-5)


def test_held_out_measures_are_those_of_whole_distributions(pair):
    student, teacher = pair
    terms = replace(TERMS, temperature=3.0)
    objective = LanguageObjective(student, None, terms, held_out_teacher=LiveTeacher(teacher))
    ids = text(18, 5)
    with torch.no_grad():
        found = objective.held_out(alone(ids))
        p, q = (m.model(ids).logits[0, :-1].log_softmax(-1) for m in (teacher, student))
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    assert found["task"] == pytest.approx(-float(q[range(17), ids[0, 1:]].sum()), rel=1e-5)
    assert found["accuracy"] == int((q.argmax(-1) == ids[0, 1:]).sum())
    assert found["top1_agreement"] == int((q.argmax(-1) == p.argmax(-1)).sum())
    assert objective.chosen_by == "kl"


def test_an_encoder_has_no_next_token_to_teach():
    with pytest.raises(CannotCompress, match="no next token"):
        LiveTeacher(tiny_model("bert"))


def test_the_student_continues_its_own_texts_and_only_its_words_are_judged(pair):
    student, teacher = pair
    writer = OnPolicy(student, LiveTeacher(teacher), 1.0)
    given = end_to_end(alone(text(16, 6), prompt=7), alone(text(5, 7)), padding=3)
    torch.manual_seed(3)
    written = writer.continued(given)
    torch.manual_seed(3)
    assert torch.equal(writer.continued(given).ids_BP, written.ids_BP)
    assert written.ids_BP.shape == (1, 16)
    assert torch.equal(written.ids_BP[:, :7], given.ids_BP[:, :7])
    judged = (written.targets_BP != IGNORE)[0].nonzero()[:, 0].tolist()
    assert judged == list(range(6, 6 + len(judged)))
    assert judged
    assert written.targets_BP[0, judged].tolist() == written.ids_BP[0, 7 : 7 + len(judged)].tolist()
    half = writer.continued(alone(text(16, 8)))
    assert int((half.targets_BP != IGNORE).int().argmax()) == 7, (
        "a text without a prompt is continued from its middle"
    )


def test_a_sure_student_writes_what_it_is_sure_of(pair):
    student, teacher = pair
    with torch.no_grad():
        student.model.get_submodule(student.anatomy.unembedding).weight.mul_(1e4)
        batch = alone(text(12, 9), prompt=4)
        written = OnPolicy(student, LiveTeacher(teacher), 1.0).continued(batch)
        greedy = student.model(written.ids_BP).logits[0].argmax(-1)
        student.model.get_submodule(student.anatomy.unembedding).weight.div_(1e4)
    assert written.ids_BP[0, 4:].tolist() == greedy[3:-1].tolist()


def test_a_share_of_batches_is_written_and_answered_by_the_running_teacher(pair):
    student, teacher = pair
    writer = OnPolicy(student, LiveTeacher(teacher), 0.5)
    torch.manual_seed(0)
    assert 30 < sum(writer.drawn() for _ in range(100)) < 70
    always = LanguageObjective(
        student, None, Terms(named("reverse_kl")), on_policy=replace(writer, share=1.0)
    )
    found = always(alone(text(16, 1), prompt=7))
    assert found.parts["kd"] > 0
    assert found.n <= 9
