"""Skew reverse KL, KL(q ‖ (1 − α) p + α q), p teacher, q student (DistiLLM, arXiv 2402.03898).

Reverse KL against a mixture that has some of the student in it: at most −ln α however unlikely the teacher finds what the
student says. α = 0 is reverse KL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.distill.losses import forward_kl
from core.distill.losses._mixture import log_mixture
from core.distill.teacher_rows import TeacherRows, outcomes

if TYPE_CHECKING:
    from torch import Tensor


def divergence(log_p_NO: Tensor, log_q_NO: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(q ‖ (1 − α) p + α q) at each position, nats [N]."""
    return forward_kl.divergence(log_q_NO, log_mixture(log_q_NO, log_p_NO, alpha))


def loss(
    student_logits_NV: Tensor, teacher: TeacherRows, *, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """T² · KL(q ‖ (1 − α) p + α q) at each position [N]; a lower bound of it on ``TopK``."""
    log_p_NO, log_q_NO = outcomes(student_logits_NV, teacher, temperature=temperature)
    return temperature**2 * divergence(log_p_NO, log_q_NO, alpha=alpha)
