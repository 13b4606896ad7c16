"""Skew KL, KL(p ‖ α p + (1 − α) q), p teacher, q student (DistiLLM, arXiv 2402.03898).

Forward KL against a mixture that has some of the teacher in it: at most −ln α however little the student gives to a
token, so that no gradient explodes. α = 0 is forward KL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.distill.losses import forward_kl
from core.distill.losses._mixture import log_mixture
from core.distill.teacher_rows import TeacherRows, outcomes

if TYPE_CHECKING:
    from torch import Tensor


def divergence(log_p_NO: Tensor, log_q_NO: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(p ‖ α p + (1 − α) q) at each position, nats [N]."""
    return forward_kl.divergence(log_p_NO, log_mixture(log_p_NO, log_q_NO, alpha))


def loss(
    student_logits_NV: Tensor, teacher: TeacherRows, *, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """T² · KL(p ‖ α p + (1 − α) q) at each position [N]; a lower bound of it on ``TopK``."""
    log_p_NO, log_q_NO = outcomes(student_logits_NV, teacher, temperature=temperature)
    return temperature**2 * divergence(log_p_NO, log_q_NO, alpha=alpha)
