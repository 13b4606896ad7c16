"""How much of an answer is there: the metric that patching moves, and the share of the way it moved it.

Legend: R rows, V vocabulary, D d_model. A metric is read from final residuals [R, D] at the last position. With the
clean run's metric as 1 and the corrupted run's as 0, recovered = (m − m_corrupted) / (m_clean − m_corrupted)
(Wang et al. 2022; Zhang & Nanda 2024). It knows no patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from core.errors import BadInput, SlimscopeError
from core.lazy import torch
from core.models.readout import finish_logits, unembed
from core.probes._distribution import rows_at_once
from core.probes._targets import Token, named, resolve_token

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

MetricName = Literal["logit_difference", "probability", "kl"]
UNITS: dict[MetricName, str] = {"logit_difference": "logits", "probability": "probability", "kl": "nats"}
SMALLEST_GAP: dict[MetricName, float] = {"logit_difference": 0.05, "probability": 1e-3, "kl": 1e-3}
"""A gap between clean and corrupted below this leaves nothing to divide by."""


@dataclass(frozen=True)
class PatchMetric:
    """One number per final residual, and what it is for the clean and the corrupted prompt."""

    loaded: LoadedModel
    name: MetricName
    target: Token
    distractor: Token | None
    """Only of a logit difference."""
    reference_log_p_V: Tensor
    """The clean prompt's own prediction, which ``kl`` measures the distance to."""
    clean: float
    corrupted: float

    @property
    def unit(self) -> str:
        """Of the metric."""
        return UNITS[self.name]

    @property
    def label(self) -> str:
        """What is measured, in words."""
        if self.name == "kl":
            return "KL(clean ‖ patched)"
        if self.name == "probability":
            return f"p({self.target.text!r})"
        assert self.distractor is not None
        return f"logit({self.target.text!r}) − logit({self.distractor.text!r})"

    @property
    def gap(self) -> float:
        """m_clean − m_corrupted."""
        return self.clean - self.corrupted

    def of_residuals(self, residual_RD: Tensor) -> Tensor:
        """The metric of each final residual, float32 (float64 for a float64 model), [R]."""
        return measure_residuals(
            self.loaded, residual_RD, self.name, self.target, self.distractor, self.reference_log_p_V
        )

    def of_logits(self, logits_RV: Tensor) -> Tensor:
        """The metric of each row of logits, [R]; differentiable."""
        return measure_logits(logits_RV, self.name, self.target, self.distractor, self.reference_log_p_V)

    def recovered(self, values_R: Tensor) -> Tensor:
        """Share of the way from the corrupted (0) to the clean (1) prompt's metric."""
        return (values_R - self.corrupted) / self.gap


def choose_metric(
    loaded: LoadedModel,
    name: MetricName,
    *,
    target: str,
    distractor: str,
    clean_residual_D: Tensor,
    corrupted_residual_D: Tensor,
) -> PatchMetric:
    """Settle tokens and both ends of the scale.

    Nothing typed means the clean prompt's top prediction as target and the corrupted prompt's as distractor. Raises
    ``BadInput`` when both are one token, or when clean and corrupted prompt give the metric the same value.
    """
    logits_2V = unembed(loaded.model, loaded.anatomy, torch.stack([clean_residual_D, corrupted_residual_D]))
    logits_2V = _at_least_float32(logits_2V)
    if not torch.isfinite(logits_2V).all():
        raise SlimscopeError(
            "the model's logits on these prompts are not finite (NaN or infinity), so nothing can be compared; "
            "open the model in float32, or check its weights"
        )
    wanted = resolve_token(loaded, target, role="target", logits_V=logits_2V[0])
    other = None
    if name == "logit_difference":
        other = resolve_token(loaded, distractor, role="distractor", logits_V=logits_2V[1])
        if other.id == wanted.id:
            raise BadInput(
                f"target and distractor are both {wanted.text!r}"
                + ("" if distractor else ", the top prediction of both prompts")
                + "; name two different tokens, e.g. the right answer of each prompt"
            )
    log_p_V = torch.log_softmax(logits_2V[0], -1)
    clean, corrupted = measure_logits(logits_2V, name, wanted, other, log_p_V).tolist()
    metric = PatchMetric(loaded, name, wanted, other, log_p_V, clean, corrupted)
    if abs(metric.gap) < SMALLEST_GAP[name]:
        raise BadInput(
            f"{metric.label} is {clean:.4f} on the clean and {corrupted:.4f} on the corrupted prompt, so there is nothing to "
            f"recover (a gap of at least {SMALLEST_GAP[name]} {metric.unit} is needed); change a word that the answer "
            f"depends on, or name other tokens than {wanted.text!r} and "
            f"{named(loaded, int(logits_2V[1].argmax())).text if other is None else other.text!r}"
        )
    return metric


def measure_residuals(
    loaded: LoadedModel,
    residual_RD: Tensor,
    name: MetricName,
    target: Token,
    distractor: Token | None,
    reference_log_p_V: Tensor,
) -> Tensor:
    """The metric of final residuals; a logit difference takes two rows of a plain unembedding, not all."""
    model, anatomy = loaded.model, loaded.anatomy
    assert anatomy.unembedding is not None
    head = model.get_submodule(anatomy.unembedding)
    if name == "logit_difference" and type(head) is torch.nn.Linear and anatomy.head_transform is None:
        assert distractor is not None
        if anatomy.final_norm is not None:
            residual_RD = model.get_submodule(anatomy.final_norm)(residual_RD)
        two = [target.id, distractor.id]
        bias = None if head.bias is None else head.bias[two]
        logits_R2 = finish_logits(anatomy, torch.nn.functional.linear(residual_RD, head.weight[two], bias))
        logits_R2 = _at_least_float32(logits_R2)
        return logits_R2[:, 0] - logits_R2[:, 1]
    parts = [
        measure_logits(unembed(model, anatomy, part_RD), name, target, distractor, reference_log_p_V)
        for part_RD in torch.split(residual_RD, rows_at_once(anatomy.vocab_size))
    ]
    return torch.cat(parts)


def measure_logits(
    logits_RV: Tensor, name: MetricName, target: Token, distractor: Token | None, reference_log_p_V: Tensor
) -> Tensor:
    """The metric of logits, [R]."""
    logits_RV = _at_least_float32(logits_RV)
    if name == "logit_difference":
        assert distractor is not None
        return logits_RV[:, target.id] - logits_RV[:, distractor.id]
    log_p_RV = torch.log_softmax(logits_RV, -1)
    if name == "probability":
        return log_p_RV[:, target.id].exp()
    return (reference_log_p_V.exp() * (reference_log_p_V - log_p_RV)).sum(-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
