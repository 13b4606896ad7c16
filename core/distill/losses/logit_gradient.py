"""The loss of a slice of positions and its gradient in their logits, from one softmax.

With p and log q over outcomes (see ``teacher_rows``), let g = ∂divergence/∂log q, as autograd gives it for the outcomes
alone, and G = Σ g. In the scaled logits y = z / T the gradient is then g_k − G q_k for a kept token k, and
q_v · (g_tail / q_tail − G) for any other: with K kept tokens, the softmax times one number per position, and K
corrections. All divergences here have this form, and the task's cross entropy adds q_v and subtracts 1 at its target.

Legend: R positions of the slice, V vocabulary, K kept tokens, O outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.distill.losses.named import Divergence
from core.distill.teacher_rows import LOG_FLOOR, Dense, TopK
from core.lazy import torch
from core.models.readout import finish_logits

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.anatomy import Anatomy


@dataclass(frozen=True)
class Terms:
    """What the loss of a position is made of: kd_weight · T² · divergence + task_weight · cross entropy."""

    divergence: Divergence
    temperature: float = 1.0
    kd_weight: float = 1.0
    task_weight: float = 0.0

    @property
    def knows_task(self) -> bool:
        """Whether the cross entropy is wanted, or comes for nothing with the teacher's softmax."""
        return self.temperature == 1.0 or self.task_weight > 0


def of_slice(
    raw_RV: Tensor, targets_R: Tensor, rows: Dense | TopK | None, terms: Terms, anatomy: Anatomy
) -> tuple[Tensor, Tensor]:
    """Sums of (loss, KD, task) in nats, and the loss' gradient in what the head's product gave, float32 [R, V].

    May write over ``raw_RV``.
    """
    logits_RV = finish_logits(anatomy, raw_RV).float()
    slope_RV = None if anatomy.logit_softcap is None else 1 - (logits_RV / anatomy.logit_softcap).square()
    target_R1 = targets_R[:, None]
    aimed_R = logits_RV.gather(-1, target_R1)[:, 0]
    kd = task = logits_RV.new_zeros(())
    if rows is None:
        gradient_RV, normaliser_R = _softmax(logits_RV, terms.task_weight)
    elif terms.temperature == 1.0:
        kd, gradient_RV, normaliser_R = _learn(logits_RV, rows, terms, softmax_weight=terms.task_weight)
    else:
        scaled_RV = logits_RV / terms.temperature
        kd, gradient_RV, _ = _learn(scaled_RV, rows, terms, softmax_weight=0.0)
        if terms.knows_task:
            plain_RV, normaliser_R = _softmax(logits_RV, terms.task_weight)
            gradient_RV += plain_RV
    if terms.knows_task:
        task = (normaliser_R - aimed_R).sum()
    if terms.task_weight:
        gradient_RV.scatter_add_(-1, target_R1, torch.full_like(aimed_R, -terms.task_weight)[:, None])
    if slope_RV is not None:
        gradient_RV *= slope_RV
    if anatomy.logit_scale != 1.0:
        gradient_RV *= anatomy.logit_scale
    loss = terms.kd_weight * kd + terms.task_weight * task
    return torch.stack((loss, kd, task if terms.knows_task else task + float("nan"))), gradient_RV


def _softmax(logits_RV: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(weight · softmax, log Σ exp), in place."""
    top_R1 = logits_RV.amax(-1, keepdim=True)
    exp_RV = logits_RV.sub_(top_R1).exp_()
    total_R1 = exp_RV.sum(-1, keepdim=True)
    return exp_RV.mul_(weight / total_R1), (top_R1 + total_R1.log())[:, 0]


def _learn(
    scaled_RV: Tensor, rows: Dense | TopK, terms: Terms, *, softmax_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ T² · divergence, its weighted gradient in the logits + ``softmax_weight`` · q, log Σ exp), in place."""
    chain = terms.kd_weight * terms.temperature  # T² of the loss, 1 / T of the scaled logits
    top_R1 = scaled_RV.amax(-1, keepdim=True)
    scaled_RV -= top_R1
    if isinstance(rows, Dense):
        log_total_R1 = scaled_RV.logsumexp(-1, keepdim=True)
        log_q_RV = scaled_RV.sub_(log_total_R1)
        log_p_RV = rows.log_probabilities(terms.temperature, scaled_RV.shape[1])
        kd, slope_RV = _divergence(log_p_RV, log_q_RV, terms)
        towards_R1 = softmax_weight - chain * slope_RV.sum(-1, keepdim=True)
        gradient_RV = log_q_RV.exp_().mul_(towards_R1).add_(slope_RV, alpha=chain)
        return kd, gradient_RV, (top_R1 + log_total_R1)[:, 0]
    assert rows.temperature == terms.temperature, "rows kept at one temperature say nothing of another"
    ids_RK = rows.ids_NK.long()
    kept_RK = scaled_RV.gather(-1, ids_RK)
    exp_RV = scaled_RV.exp_().scatter_(-1, ids_RK, 0.0)
    exp_kept_RK, tail_R1 = kept_RK.exp(), exp_RV.sum(-1, keepdim=True)
    total_R1 = tail_R1 + exp_kept_RK.sum(-1, keepdim=True)
    log_total_R1 = total_R1.log()
    log_tail_R1 = (tail_R1.log() - log_total_R1).clamp_min(LOG_FLOOR)
    log_q_RO = torch.cat((kept_RK - log_total_R1, log_tail_R1), -1)
    kd, slope_RO = _divergence(rows.log_probabilities(), log_q_RO, terms)
    everywhere_R1 = (softmax_weight - chain * slope_RO.sum(-1, keepdim=True)) / total_R1
    in_tail_R1 = chain * slope_RO[:, -1:] / (log_tail_R1.exp() * total_R1)
    gradient_RV = exp_RV.mul_(everywhere_R1 + in_tail_R1)
    gradient_RV.scatter_(-1, ids_RK, exp_kept_RK * everywhere_R1 + chain * slope_RO[:, :-1])
    return kd, gradient_RV, (top_R1 + log_total_R1)[:, 0]


def _divergence(log_p_RO: Tensor, log_q_RO: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """(Σ T² · divergence, ∂divergence/∂log q)."""
    with torch.enable_grad():
        learned_RO = log_q_RO.detach().requires_grad_()
        total = terms.divergence(log_p_RO, learned_RO).sum()
        (slope_RO,) = torch.autograd.grad(total, learned_RO)
    return terms.temperature**2 * total.detach(), slope_RO
