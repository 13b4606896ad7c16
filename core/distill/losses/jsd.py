"""Generalised Jensen–Shannon divergence, β · KL(p ‖ m) + (1 − β) · KL(q ‖ m), m = β p + (1 − β) q (GKD, arXiv 2306.13649).

Symmetric at β = ½, where it is at most ln 2. At β → 0 it vanishes like β · KL(p ‖ q) and at β → 1 like (1 − β) · KL(q ‖ p);
at the ends themselves it stands, as in TRL, for those two divergences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.distill.losses import forward_kl, reverse_kl
from core.distill.losses._mixture import log_mixture
from core.distill.teacher_rows import TeacherRows, outcomes

if TYPE_CHECKING:
    from torch import Tensor


def divergence(log_p_NO: Tensor, log_q_NO: Tensor, *, beta: float = 0.5) -> Tensor:
    """JSD_β(p, q) at each position, nats [N]."""
    if beta == 0.0:
        return forward_kl.divergence(log_p_NO, log_q_NO)
    if beta == 1.0:
        return reverse_kl.divergence(log_p_NO, log_q_NO)
    log_m_NO = log_mixture(log_p_NO, log_q_NO, beta)
    return beta * forward_kl.divergence(log_p_NO, log_m_NO) + (1 - beta) * forward_kl.divergence(
        log_q_NO, log_m_NO
    )


def loss(
    student_logits_NV: Tensor, teacher: TeacherRows, *, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """T² · JSD_β(p, q) at each position [N]; a lower bound of it on ``TopK``."""
    log_p_NO, log_q_NO = outcomes(student_logits_NV, teacher, temperature=temperature)
    return temperature**2 * divergence(log_p_NO, log_q_NO, beta=beta)
