"""The gradient taken in the forward pass equals autograd's, whatever the head does to its logits."""

import pytest
import torch

from core.distill.head import head_of
from core.distill.losses import fused_head
from core.distill.losses.logit_gradient import Terms
from core.distill.losses.named import named
from core.distill.teacher_rows import Dense, outcomes, top_k_of
from core.models.open import open_model
from core.types import ModelRef
from tests.tiny import tiny_folder

N = 11


@pytest.fixture(scope="module", params=["llama", "gemma2", "granitemoe"])
def head(request, tmp_path_factory):
    """A plain head; one with a softcap; a tied one whose logits are divided."""
    folder = tiny_folder(request.param, tmp_path_factory.mktemp(request.param))
    found = head_of(open_model(ModelRef(str(folder))))
    found.module.weight.requires_grad_(True)
    return found


def drawn(head, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, head.weight_VD.shape[1], generator=draw)
    targets = torch.randint(0, head.vocabulary, (N,), generator=draw)
    return hidden.requires_grad_(), targets, 3 * torch.randn(N, head.vocabulary, generator=draw)


def slowly(head, hidden, targets, rows, terms):
    logits = head.logits(hidden)
    task = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    if rows is None:
        return terms.task_weight * task
    p, q = outcomes(logits, rows, temperature=terms.temperature)
    kd = terms.temperature**2 * terms.divergence(p, q).sum()
    return terms.kd_weight * kd + terms.task_weight * task


@pytest.mark.parametrize("loss", ["forward_kl", "jsd", "skew_reverse_kl"])
@pytest.mark.parametrize(("temperature", "task_weight"), [(1.0, 0.7), (2.0, 0.7), (2.0, 0.0)])
def test_loss_and_gradients_are_autograds_in_any_number_of_blocks(
    head, loss, temperature, task_weight, monkeypatch
):
    monkeypatch.setattr(fused_head, "BLOCK_BYTES", 5 * 4 * head.vocabulary)
    monkeypatch.setattr(fused_head, "SLICE_BYTES", 2 * 4 * head.vocabulary)
    hidden, targets, teacher = drawn(head)
    terms = Terms(named(loss), temperature, 1.3, task_weight)
    for rows in (Dense(teacher), top_k_of(teacher, 8, temperature), None):
        expected = slowly(head, hidden, targets, rows, terms)
        found = fused_head.fused_head_loss(hidden, head, targets, rows, terms)
        torch.testing.assert_close(found.loss.detach(), expected.detach(), rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(0.5 * found.loss, (hidden, head.module.weight))
        theirs = torch.autograd.grad(0.5 * expected, (hidden, head.module.weight))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_does_not_learn_gets_no_gradient_and_parts_are_unweighted(head):
    hidden, targets, teacher = drawn(head)
    terms = Terms(named("forward_kl"), 1.0, 2.0, 0.5)
    found = fused_head.fused_head_loss(hidden, head, targets, Dense(teacher), terms)
    assert float(found.loss.detach()) == pytest.approx(
        2 * float(found.kd) + 0.5 * float(found.task), rel=1e-6
    )
    head.module.weight.requires_grad_(False)
    frozen = fused_head.fused_head_loss(hidden, head, targets, Dense(teacher), terms)
    head.module.weight.requires_grad_(True)
    torch.testing.assert_close(
        torch.autograd.grad(frozen.loss, hidden), torch.autograd.grad(found.loss, hidden)
    )
    with torch.no_grad():
        assert not fused_head.fused_head_loss(hidden, head, targets, None, terms).loss.requires_grad


def test_a_cut_vocabulary_gives_its_gradient_to_the_tokens_that_count(head):
    from dataclasses import replace

    hidden, targets, teacher = drawn(head)
    cut = replace(head, vocabulary=head.vocabulary - 7)
    terms = Terms(named("forward_kl"))
    loss = fused_head.fused_head_loss(
        hidden, cut, targets.clamp_max(cut.vocabulary - 1), Dense(teacher[:, :-7]), terms
    ).loss
    (gradient,) = torch.autograd.grad(loss, head.module.weight)
    assert gradient[-7:].abs().max() == 0
    assert gradient[:-7].abs().sum() > 0


def test_a_head_with_a_hook_is_not_plain(head):
    assert head.is_plain
    hook = head.module.register_forward_hook(lambda module, args, output: output)
    assert not head.is_plain
    hook.remove()
    assert head.is_plain


def test_float32_logits_of_all_positions_are_never_whole(head, monkeypatch):
    seen = []
    of_slice = fused_head.of_slice

    def watched(raw, *args):
        seen.append(len(raw))
        return of_slice(raw, *args)

    monkeypatch.setattr(fused_head, "of_slice", watched)
    monkeypatch.setattr(fused_head, "SLICE_BYTES", 3 * 4 * head.vocabulary)
    hidden, targets, teacher = drawn(head)
    fused_head.fused_head_loss(hidden, head, targets, Dense(teacher), Terms(named("forward_kl")))
    assert sum(seen) == N
    assert max(seen) <= 3
