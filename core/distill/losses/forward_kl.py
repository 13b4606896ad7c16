"""Forward KL, KL(p ‖ q) = Σ p · (log p − log q), p teacher, q student (Hinton et al., arXiv 1503.02531).

It is large where the student gives little to what the teacher finds likely, so the student covers all of it. The gradient
in the student's logits is T · (q − p) with the factor T² of ``loss``, which keeps its size about the same at any T.
Not ``F.kl_div(reduction="mean")``: that divides by positions and by the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.distill.teacher_rows import TeacherRows, outcomes

if TYPE_CHECKING:
    from torch import Tensor


def divergence(log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
    """KL(p ‖ q) at each position, nats [N]."""
    return (log_p_NO.exp() * (log_p_NO - log_q_NO)).sum(-1)


def loss(student_logits_NV: Tensor, teacher: TeacherRows, *, temperature: float = 1.0) -> Tensor:
    """T² · KL(p ‖ q) at each position [N]; a lower bound of it on ``TopK``."""
    return temperature**2 * divergence(*outcomes(student_logits_NV, teacher, temperature=temperature))
