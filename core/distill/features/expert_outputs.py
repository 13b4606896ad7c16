"""Experts' outputs: what a mixture of experts writes to the residual stream, or what each of its experts says.

* ``together``: ‖P m − m'‖² / ‖m'‖² per token, m what the student's block writes there and m' what its twin's experts
  write together, shared expert included. The student's block may be dense, or have other experts: this is the loss for a
  mixture that became dense, lost or merged experts.
* ``each``: Σ_k w_k ‖P f_k(x) − f'_k(x')‖² / ‖f'_k(x')‖² per token over the experts k that the *teacher* chose, with its
  routing weights w (made to sum to 1); both models' expert k runs on what it reads in its own model. An expert learns
  from all tokens of its twin, also those that its own router does not send. Needs the same experts in both, and runs them
  a second time: as much work again as the experts' forward and backward pass.

The mean over layers.

Legend: ``N`` tokens that count, ``K`` slots of the teacher, ``M`` N · K, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from core.distill.features.feature_loss import projected, relative_error, tokens
from core.distill.features.reading import Read, Reads
from core.distill.features.router_match import paired_mixtures
from core.distill.layer_map import LayerMap
from core.errors import BadInput
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch

Kind = Literal["together", "each"]


class ExpertOutputs:
    """What student blocks write against what the experts of their twins write."""

    name = "experts"

    def __init__(
        self,
        student: LoadedModel,
        teacher: LoadedModel,
        layers: LayerMap,
        *,
        kind: Kind,
        projection_TS: Any | None,
    ) -> None:
        self.kind = kind
        self.projection_TS = projection_TS
        self.models = (student.model, teacher.model)
        if kind == "together":
            self._read_writes(student, teacher, layers)
        else:
            self._read_experts(student, teacher, layers)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The projection, where there is one."""
        return {} if self.projection_TS is None else {"projection": self.projection_TS}

    def loss(self, student: Reads, teacher: Reads, batch: Batch, counted_BP: Tensor) -> Tensor:
        """Sum over tokens of the mean over layers."""
        of_layer = self._together if self.kind == "together" else self._each
        found = [of_layer(*pair, student, teacher, counted_BP) for pair in self.pairs]
        return torch.stack(found).mean()

    def _read_writes(self, student: LoadedModel, teacher: LoadedModel, layers: LayerMap) -> None:
        blocks = zip(student.anatomy.blocks, layers.twins, strict=True)
        twins = [(block, teacher.anatomy.blocks[twin]) for block, twin in blocks]
        self.pairs = [(ours.mlp_write, theirs.mlp_write) for ours, theirs in twins if theirs.is_moe]
        if not self.pairs:
            raise BadInput(
                f"no block of {teacher.ref} that teaches has experts; set expert_weight=0, and match hidden states "
                "(hidden_weight)"
            )
        self.student_reads = tuple(Read(ours) for ours, _ in self.pairs)
        self.teacher_reads = tuple(Read(theirs) for _, theirs in self.pairs)

    def _read_experts(self, student: LoadedModel, teacher: LoadedModel, layers: LayerMap) -> None:
        found = paired_mixtures(student, teacher, layers)
        if any(mixture.shim for pair in found for mixture in pair):
            raise BadInput(
                f"the experts of {teacher.anatomy.architecture} cannot be run one by one; match them together"
            )
        self.pairs = [(ours.experts, theirs.experts) for ours, theirs in found]
        self.student_reads = tuple(Read(ours, inputs=True) for ours, _ in self.pairs)
        self.teacher_reads = tuple(
            Read(theirs, inputs=True, item=item) for _, theirs in self.pairs for item in range(3)
        )

    def _together(self, ours: str, theirs: str, student: Reads, teacher: Reads, counted_BP: Tensor) -> Tensor:
        ours_ND = projected(tokens(student[Read(ours)], counted_BP), self.projection_TS)
        return relative_error(ours_ND, tokens(teacher[Read(theirs)], counted_BP).detach()).sum()

    def _each(self, ours: str, theirs: str, student: Reads, teacher: Reads, counted_BP: Tensor) -> Tensor:
        counted_N = counted_BP.flatten()
        read, twin_read, chosen, weights = (
            states.reshape(-1, states.shape[-1])[counted_N]
            for states in (
                student[Read(ours, inputs=True)],
                *(teacher[Read(theirs, inputs=True, item=item)].detach() for item in range(3)),
            )
        )
        experts, twins = self.models[0].get_submodule(ours), self.models[1].get_submodule(theirs)
        ours_MD = projected(_one_by_one(experts, read, chosen).float(), self.projection_TS)
        with torch.no_grad():
            theirs_MD = _one_by_one(twins, twin_read, chosen).float()
        error_NK = relative_error(ours_MD, theirs_MD).view_as(weights)
        share_NK = weights.float() / weights.float().sum(-1, keepdim=True)
        total: Tensor = (share_NK * error_NK).sum()
        return total


def _one_by_one(experts: Any, read_ND: Tensor, chosen_NK: Tensor) -> Tensor:
    """f_k of every token and slot by itself, [M, D], by the model's own code: each slot as a token with weight 1."""
    read_MD = read_ND.repeat_interleave(chosen_NK.shape[1], dim=0)
    output: Tensor = experts(read_MD, chosen_NK.reshape(-1, 1), read_MD.new_ones(len(read_MD), 1))
    return output
