"""Every logit loss against its formula written out, and its identities (legend: N positions, V vocabulary)."""

import math
from functools import partial

import pytest
import torch

from core.distill.losses import cross_entropy, forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl
from core.distill.losses.named import named
from core.distill.teacher_rows import Dense, outcomes, top_k_of
from tests.references import slow_distillation as slow

N, V, K = 6, 23, 5
LOSSES = {
    "forward_kl": forward_kl.loss,
    "reverse_kl": reverse_kl.loss,
    "jsd": partial(jsd.loss, beta=0.3),
    "skew_kl": partial(skew_kl.loss, alpha=0.1),
    "skew_reverse_kl": partial(skew_reverse_kl.loss, alpha=0.1),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed))


@each_loss
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_loss_is_its_formula_written_out_over_all_tokens_and_over_kept_ones(name, temperature):
    student, teacher = logits(0), logits(1)
    settings = {"temperature": temperature, "beta": 0.3, "alpha": 0.1}
    rows = top_k_of(teacher, K, temperature)
    pairs = list(zip(student.tolist(), teacher.tolist(), rows.ids_NK.tolist(), strict=True))
    dense = LOSSES[name](student, Dense(teacher), temperature=temperature)
    kept = LOSSES[name](student, rows, temperature=temperature)
    assert dense.tolist() == pytest.approx([slow.loss(name, s, t, **settings) for s, t, _ in pairs], rel=2e-5)
    slowly = [slow.loss(name, s, t, kept=ids, **settings) for s, t, ids in pairs]
    assert kept.tolist() == pytest.approx(slowly, rel=2e-5)


@each_loss
def test_a_student_that_says_the_same_has_no_loss_and_no_gradient(name):
    for rows, temperature in ((Dense(logits(0)), 3.0), (top_k_of(logits(0), K, 1.0), 1.0)):
        student = logits(0).requires_grad_()
        found = LOSSES[name](student, rows, temperature=temperature)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert found.abs().max() < 1e-6
        assert gradient.abs().max() < 1e-6


@each_loss
def test_kept_tokens_and_a_tail_bound_the_loss_from_below_and_all_tokens_but_one_give_it(name):
    student, teacher = logits(2), logits(3)
    whole = LOSSES[name](student, Dense(teacher))
    bounds = [LOSSES[name](student, top_k_of(teacher, k, 1.0)) for k in (1, 4, 12, V - 1)]
    for smaller, larger in zip([torch.zeros(N), *bounds], [*bounds, whole], strict=True):
        assert (smaller <= larger + 1e-6).all(), "fewer outcomes can only tell less apart"
    assert (bounds[0] < whole - 1e-3).any(), "one kept token must lose something"
    torch.testing.assert_close(bounds[-1], whole)


def test_jensen_shannon_is_symmetric_and_bounded_at_one_half_and_tends_to_kl_at_its_ends():
    far, near = logits(4, scale=20.0), logits(5, scale=20.0)
    there, back = jsd.loss(far, Dense(near), beta=0.5), jsd.loss(near, Dense(far), beta=0.5)
    torch.testing.assert_close(there, back)
    assert there.max() <= math.log(2) + 1e-6
    assert there.max() > 0.6
    p, q = logits(0).double().log_softmax(-1), logits(1).double().log_softmax(-1)
    forward, reverse = forward_kl.divergence(p, q), reverse_kl.divergence(p, q)
    torch.testing.assert_close(jsd.divergence(p, q, beta=1e-6) / 1e-6, forward, rtol=1e-3, atol=0)
    torch.testing.assert_close(jsd.divergence(p, q, beta=1 - 1e-6) / 1e-6, reverse, rtol=1e-3, atol=0)
    assert torch.equal(jsd.divergence(p, q, beta=0.0), forward)
    assert torch.equal(jsd.divergence(p, q, beta=1.0), reverse)


def test_a_skew_of_zero_is_none_and_any_other_bounds_the_loss():
    p, q = logits(0, 30.0).log_softmax(-1), logits(1, 30.0).log_softmax(-1)
    assert torch.equal(skew_kl.divergence(p, q, alpha=0.0), forward_kl.divergence(p, q))
    assert torch.equal(skew_reverse_kl.divergence(p, q, alpha=0.0), reverse_kl.divergence(p, q))
    for skewed in (skew_kl, skew_reverse_kl):
        assert skewed.divergence(p, q, alpha=0.1).max() <= -math.log(0.1) + 1e-5
    assert forward_kl.divergence(p, q).max() > 10


def test_forward_kl_is_torchs_summed_over_the_vocabulary():
    student, teacher = logits(0), logits(1)
    ours = forward_kl.loss(student, Dense(teacher))
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    theirs = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none")
    torch.testing.assert_close(ours, theirs.sum(-1))


def test_the_factor_of_temperature_keeps_the_size_of_the_gradient():
    def size(temperature: float, factor: float) -> float:
        student = logits(0, 1.0).requires_grad_()
        found = factor * forward_kl.loss(student, Dense(logits(1, 1.0)), temperature=temperature).sum()
        return float(torch.autograd.grad(found, student)[0].norm())

    assert size(50.0, 1.0) == pytest.approx(size(100.0, 1.0), rel=0.02)
    assert size(50.0, 1 / 50**2) > 3.5 * size(100.0, 1 / 100**2), "without it the gradient falls with T²"


def test_padding_of_a_vocabulary_is_no_outcome():
    student, teacher = logits(0), logits(1)
    padded = torch.cat((student, torch.full((N, 3), 5.0)), -1)
    expected = forward_kl.loss(student, Dense(teacher))
    torch.testing.assert_close(forward_kl.loss(padded, Dense(teacher)), expected)
    torch.testing.assert_close(
        forward_kl.loss(student, Dense(torch.cat((teacher, padded[:, -3:]), -1))), expected
    )


def test_a_teacher_that_is_certain_teaches_the_task():
    student, targets = logits(0), torch.arange(N)
    certain = Dense(1e4 * torch.nn.functional.one_hot(targets, V).float())
    torch.testing.assert_close(forward_kl.loss(student, certain), cross_entropy.loss(student, targets))


def test_a_sure_student_and_teacher_stay_finite():
    sure, other = torch.zeros(1, V), torch.zeros(1, V)
    sure[0, 0] = other[0, 1] = 1e4
    for name in LOSSES:
        student = sure.clone().requires_grad_()
        log_p, log_q = outcomes(student, top_k_of(other, 1, 1.0), temperature=1.0)
        found = named(name)(log_p, log_q).sum()
        assert found.isfinite()
        assert torch.autograd.grad(found, student)[0].isfinite().all()
