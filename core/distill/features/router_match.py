"""Routers: what the student's routers say of every token against what their twins say.

Per token and pair of mixtures of experts, over all E experts, with z the routers' logits:

* routers that share their weight among experts (softmax): KL(softmax z of the teacher ‖ softmax z of the student);
* routers that judge each expert by itself (sigmoid): Σ_e KL of the two-sided coin σ(z_e).

The choice of experts has no gradient; the logits of all of them have, so an expert that is not chosen yet can be. The
mean over layers. Both need the same experts: after experts were removed or merged, match their outputs instead.

Legend: ``N`` tokens that count, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.distill.features.feature_loss import kl, tokens
from core.distill.features.reading import Read, Reads
from core.distill.layer_map import LayerMap
from core.errors import BadInput
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.routing.discover import MoeLayer, moe_layers

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch

ONE_BY_ONE = ("topk_sigmoid", "sigmoid_bias", "sigmoid_bias_renorm")
"""Rules of routing whose scores are sigmoids."""


@dataclass(frozen=True)
class _Pair:
    ours: Read
    theirs: Read
    by_sigmoid: bool


class RouterMatch:
    """Every router of the student against its twin."""

    name = "routers"
    parameters: Mapping[str, Any] = {}

    def __init__(self, student: LoadedModel, teacher: LoadedModel, layers: LayerMap) -> None:
        self.pairs = [
            _Pair(_logits(ours), _logits(theirs), theirs.rule in ONE_BY_ONE)
            for ours, theirs in paired_mixtures(student, teacher, layers)
        ]
        self.student_reads = tuple(pair.ours for pair in self.pairs)
        self.teacher_reads = tuple(pair.theirs for pair in self.pairs)

    def loss(self, student: Reads, teacher: Reads, batch: Batch, counted_BP: Tensor) -> Tensor:
        """Sum over tokens of the mean over layers."""
        return torch.stack(
            [
                _divergence(
                    tokens(teacher[pair.theirs], counted_BP).detach(),
                    tokens(student[pair.ours], counted_BP),
                    by_sigmoid=pair.by_sigmoid,
                )
                for pair in self.pairs
            ]
        ).mean()


def paired_mixtures(
    student: LoadedModel, teacher: LoadedModel, layers: LayerMap
) -> list[tuple[MoeLayer, MoeLayer]]:
    """Mixtures of the student with their twins, of equally many experts; raises ``BadInput`` where there are none."""
    theirs = {mixture.layer: mixture for mixture in moe_layers(teacher.model)}
    found = [
        (mixture, theirs[layers.twins[mixture.layer]])
        for mixture in moe_layers(student.model)
        if layers.twins[mixture.layer] in theirs
    ]
    if not found:
        raise BadInput(
            f"no layer of {student.ref} that has experts is taught by one that has; set router_weight=0, and match what "
            "the layers give (expert_weight)"
        )
    for ours, twin in found:
        if ours.n_experts != twin.n_experts:
            raise BadInput(
                f"block {ours.layer} has {ours.n_experts} experts and its twin, block {twin.layer} of the teacher, "
                f"{twin.n_experts}: nothing says which is which; match what the layers give together instead (expert_weight)"
            )
    return found


def _logits(mixture: MoeLayer) -> Read:
    """Routers give logits first, but for those that scale their experts' inputs, which give them second."""
    return Read(mixture.router, item=1 if mixture.shim else 0)


def _divergence(theirs_NE: Tensor, ours_NE: Tensor, *, by_sigmoid: bool) -> Tensor:
    if not by_sigmoid:
        return kl(theirs_NE.log_softmax(-1), ours_NE.log_softmax(-1)).sum()
    log_p, log_q = (
        torch.stack([torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)], -1)
        for z in (theirs_NE, ours_NE)
    )
    return kl(log_p, log_q).sum()
