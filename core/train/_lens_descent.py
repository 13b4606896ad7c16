"""The descent of a tuned lens on KL(model ‖ lens), and the choice of the best translator per layer.

Legend: L translated layers, Q stored positions, R rows of one batch, V vocabulary, D d_model. Logits exist for one
batch and one layer at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch
from core.models.gradients import differentiable
from core.models.readout import unembed
from core.train._lens_report import Curve
from core.train._translators import Translators
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel
    from core.train.tuned_lens import TunedLensSettings


class Best:
    """Per layer the translator with the smallest held-out KL so far, and every curve that was measured."""

    def __init__(self, loaded: LoadedModel, held_out_QLD: Tensor, batch: int) -> None:
        self._loaded = loaded
        self._held_out = held_out_QLD
        self._batch = batch
        self.found = Translators.identity(loaded)
        self.curves: list[Curve] = []
        self.kept = ["logit lens"] * loaded.anatomy.n_layers
        self.kl_L = torch.full((loaded.anatomy.n_layers,), torch.inf)

    def offer(self, name: str, translators: Translators, progress: Progress) -> None:
        """Measure held-out KL of all layers, and keep those that are better than what is there."""
        kl_L = torch.zeros_like(self.kl_L)
        for first in range(0, len(self._held_out), self._batch):
            progress(first, len(self._held_out), f"measuring the {name} on held-out text")
            rows_RLD = self._held_out[first : first + self._batch]
            teacher = Teacher.of(self._loaded, rows_RLD[:, -1])
            for layer in range(len(kl_L)):
                kl_L[layer] += float(
                    teacher.divergence(translators.translate(layer, rows_RLD[:, layer])).sum()
                )
        kl_L /= len(self._held_out)
        self.curves.append(Curve(name, kl_L))
        for layer in (kl_L < self.kl_L).nonzero()[:, 0].tolist():
            self.found.delta_LDD[layer] = translators.delta_LDD[layer]
            self.found.bias_LD[layer] = translators.bias_LD[layer]
            self.kept[layer] = name
            self.kl_L[layer] = kl_L[layer]


@dataclass(frozen=True)
class Teacher:
    """The model's own next-token distribution at a few positions."""

    loaded: LoadedModel
    p_RV: Tensor
    negative_entropy_R: Tensor

    @classmethod
    def of(cls, loaded: LoadedModel, final_RD: Tensor) -> Teacher:
        log_p_RV = _logits(loaded, final_RD).log_softmax(-1)
        p_RV = log_p_RV.exp()
        return cls(loaded, p_RV, torch.linalg.vecdot(p_RV, log_p_RV))

    def divergence(self, translated_RD: Tensor) -> Tensor:
        """KL(model ‖ lens) per row in nats; differentiable."""
        logits_RV = _logits(self.loaded, translated_RD)
        cross_R = torch.linalg.vecdot(self.p_RV, logits_RV) - logits_RV.logsumexp(-1)
        divergence_R: Tensor = self.negative_entropy_R - cross_R
        return divergence_R


def _logits(loaded: LoadedModel, residual_RD: Tensor) -> Tensor:
    return unembed(loaded.model, loaded.anatomy, residual_RD.to(loaded.model.dtype)).float()


def descend(
    loaded: LoadedModel,
    training_QLD: Tensor,
    scale_LD: Tensor,
    start: Translators,
    best: Best,
    settings: TunedLensSettings,
    progress: Progress,
) -> None:
    """Adam on every layer at once, in coordinates of unit size: Δ_l = diag(1/s_l) · W_l · diag(s_last)."""
    steps = round(settings.epochs * len(training_QLD) / settings.batch)
    if not steps:
        return
    in_L1D, out_D = scale_LD[:-1, None], scale_LD[-1]
    weights = (start.delta_LDD * in_L1D.transpose(1, 2) / out_D).requires_grad_()
    bias = (start.bias_LD / out_D).requires_grad_()
    optimizer = torch.optim.Adam([weights, bias], lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    checks = {round(steps * (index + 1) / settings.checks) for index in range(settings.checks)}
    order = torch.randperm(len(training_QLD), generator=generator)
    for step in range(1, steps + 1):
        at = (step - 1) * settings.batch % len(order)
        rows_RLD = training_QLD[order[at : at + settings.batch].to(training_QLD.device)]
        teacher = Teacher.of(loaded, rows_RLD[:, -1])
        lost = 0.0
        for layer in range(len(weights)):
            row_RD = rows_RLD[:, layer]
            with differentiable():
                moved_RD = (row_RD / scale_LD[layer]) @ weights[layer] + bias[layer]
                loss = teacher.divergence(row_RD + moved_RD * out_D).mean()
                loss.backward()  # type: ignore[no-untyped-call]
            lost += float(loss.detach()) / len(weights)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - (step - 1) / steps)
        optimizer.step()
        optimizer.zero_grad()
        progress(step, steps, f"step {step} of {steps}: KL {lost:.3f} nats, mean of all layers")
        if step in checks:
            delta_LDD = weights.detach() / in_L1D.transpose(1, 2) * out_D
            best.offer(
                f"step {step}", Translators(delta_LDD, bias.detach() * out_D), _within(progress, step, steps)
            )


def _within(progress: Progress, step: int, steps: int) -> Progress:
    """Progress that stays at this step and only passes the message on."""
    return lambda done, total, message: progress(step, steps, message)
