"""What a teacher said at N positions: all its logits, or its K likeliest tokens and the mass of all others.

K tokens and a tail are a distribution of K + 1 outcomes, a coarse-graining of the V tokens. Every f-divergence (forward
and reverse KL, Jensen–Shannon, the skewed ones) can only shrink when outcomes are lumped together (data-processing
inequality), so a loss on ``TopK`` is a lower bound of the loss on ``Dense``: it is 0 where both agree on the lumps, and
its gradient leaves the shape of the student's tail as it is. With K = V − 1 nothing is lumped and both are equal.

Legend: N positions, V vocabulary, K kept tokens, O outcomes (V, or K + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from core.distill.head import Head
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

LOG_FLOOR = -80.0
"""Log-probability below which nothing is told apart (1.8e-35): the tail of a sure student stays a finite number."""


class TeacherRows(Protocol):
    """What a teacher said at N positions, readable in parts."""

    def __len__(self) -> int:
        """Number of positions."""

    def part(self, start: int, stop: int) -> Dense | TopK:
        """Positions ``start`` to ``stop``."""


@dataclass(frozen=True, eq=False)
class Dense:
    """All logits of a teacher, before temperature."""

    logits_NV: Tensor

    def __len__(self) -> int:
        return len(self.logits_NV)

    def part(self, start: int, stop: int) -> Dense:
        """Positions ``start`` to ``stop``."""
        return Dense(self.logits_NV[start:stop])

    @property
    def likeliest(self) -> Tensor:
        """The likeliest token of each position [N]."""
        return self.logits_NV.argmax(-1)

    def log_probabilities(self, temperature: float, vocabulary: int) -> Tensor:
        """log softmax(logits / T) over the first ``vocabulary`` tokens, float32 [N, V]."""
        return (self.logits_NV[:, :vocabulary].float() / temperature).log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Unread:
    """A teacher's final hidden states and the head that reads them: logits are made in parts, never all at once."""

    hidden_ND: Tensor
    head: Head

    def __len__(self) -> int:
        return len(self.hidden_ND)

    def part(self, start: int, stop: int) -> Dense:
        """Logits of positions ``start`` to ``stop``."""
        with torch.no_grad():
            return Dense(self.head.logits(self.hidden_ND[start:stop]))


@dataclass(frozen=True, eq=False)
class TopK:
    """The K likeliest tokens of softmax(logits / ``temperature``), and the log of the mass of all others."""

    ids_NK: Tensor
    log_p_NK: Tensor
    log_tail_N: Tensor
    temperature: float

    def __len__(self) -> int:
        return len(self.ids_NK)

    def part(self, start: int, stop: int) -> TopK:
        """Positions ``start`` to ``stop``."""
        return TopK(
            self.ids_NK[start:stop], self.log_p_NK[start:stop], self.log_tail_N[start:stop], self.temperature
        )

    @property
    def likeliest(self) -> Tensor:
        """The likeliest token of each position [N]."""
        return self.ids_NK[:, 0].long()

    def to(self, device: Any) -> TopK:
        """The same on another device."""
        return TopK(
            self.ids_NK.to(device), self.log_p_NK.to(device), self.log_tail_N.to(device), self.temperature
        )

    def log_probabilities(self) -> Tensor:
        """log p of K + 1 outcomes, the tail last, float32 [N, O].

        They sum to 1: kept in 16 bits they miss that by rounding, and what is no distribution has no divergence ≥ 0.
        """
        log_p_NO = torch.cat((self.log_p_NK.float(), self.log_tail_N.float()[:, None]), -1)
        return log_p_NO.log_softmax(-1)


def top_k_of(logits_NV: Tensor, k: int, temperature: float) -> TopK:
    """Keep the ``k`` likeliest tokens (at most V − 1) of softmax(logits / T) in float32."""
    scaled_NV = logits_NV.float() / temperature
    top_NK, ids_NK = scaled_NV.topk(min(k, scaled_NV.shape[-1] - 1), dim=-1)
    total_N1 = scaled_NV.logsumexp(-1, keepdim=True)
    log_tail_N = scaled_NV.scatter(-1, ids_NK, float("-inf")).logsumexp(-1) - total_N1[:, 0]
    return TopK(ids_NK, top_NK - total_N1, log_tail_N.clamp_min(LOG_FLOOR), temperature)


def outcomes(student_logits_NV: Tensor, teacher: TeacherRows, *, temperature: float) -> tuple[Tensor, Tensor]:
    """(log p of the teacher, log q of the student) over the same outcomes, float32 [N, O]; differentiable in q.

    Vocabularies of one tokenizer may be padded to different sizes: only the common tokens count.
    """
    rows = teacher.part(0, len(teacher))
    log_q_NV = (student_logits_NV.float() / temperature).log_softmax(-1)
    if isinstance(rows, Dense):
        common = min(student_logits_NV.shape[-1], rows.logits_NV.shape[-1])
        if common < log_q_NV.shape[-1]:
            log_q_NV = log_q_NV[:, :common].log_softmax(-1)
        return rows.log_probabilities(temperature, common), log_q_NV
    assert rows.temperature == temperature, "rows kept at one temperature say nothing of another"
    ids_NK = rows.ids_NK.long()
    tail_NV = log_q_NV.scatter(-1, ids_NK, float("-inf"))
    log_tail_N1 = tail_NV.logsumexp(-1, keepdim=True).clamp_min(LOG_FLOOR)
    return rows.log_probabilities(), torch.cat((log_q_NV.gather(-1, ids_NK), log_tail_N1), -1)
