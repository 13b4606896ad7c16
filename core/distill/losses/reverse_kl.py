"""Reverse KL, KL(q ‖ p) = Σ q · (log q − log p), p teacher, q student (MiniLLM, arXiv 2306.08543).

It is large where the student gives much to what the teacher finds unlikely, so the student settles on the likeliest and
leaves out the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.distill.teacher_rows import TeacherRows, outcomes

if TYPE_CHECKING:
    from torch import Tensor


def divergence(log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
    """KL(q ‖ p) at each position, nats [N]."""
    return (log_q_NO.exp() * (log_q_NO - log_p_NO)).sum(-1)


def loss(student_logits_NV: Tensor, teacher: TeacherRows, *, temperature: float = 1.0) -> Tensor:
    """T² · KL(q ‖ p) at each position [N]; a lower bound of it on ``TopK``."""
    return temperature**2 * divergence(*outcomes(student_logits_NV, teacher, temperature=temperature))
