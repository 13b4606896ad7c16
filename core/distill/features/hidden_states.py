"""Hidden states: the residual stream behind every student block against the teacher's (FitNets, 1412.6550; TinyBERT,
1909.10351; DistilBERT, 1910.01108).

Per token and block, with h the student's vector, t the teacher's and P the learned projection (none at equal widths):

* ``squared``: ‖P h − t‖² / ‖t‖². Divided by the teacher's own length, because that grows with depth and is hundreds of
  times larger at the few tokens with massive activations, which would be all that is learned.
* ``cosine``: 1 − cos(P h, t), which leaves the length free.

The mean over blocks, so that the weight means the same for every depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from core.distill.features.feature_loss import projected, relative_error, tokens
from core.distill.features.reading import Read, Reads
from core.distill.layer_map import LayerMap
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch

Kind = Literal["squared", "cosine"]


class HiddenStates:
    """Every student block's output against that of ``LayerMap.outputs``."""

    name = "hidden"

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
        self.student_reads = tuple(Read(block.path) for block in student.anatomy.blocks)
        self.teacher_reads = tuple(Read(teacher.anatomy.blocks[layer].path) for layer in layers.outputs)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The projection, where there is one."""
        return {} if self.projection_TS is None else {"projection": self.projection_TS}

    def loss(self, student: Reads, teacher: Reads, batch: Batch, counted_BP: Tensor) -> Tensor:
        """Sum over tokens of the mean over blocks."""
        of_blocks = []
        for ours, theirs in zip(self.student_reads, self.teacher_reads, strict=True):
            ours_NT = projected(tokens(student[ours], counted_BP), self.projection_TS)
            theirs_NT = tokens(teacher[theirs], counted_BP).detach()
            if self.kind == "squared":
                of_blocks.append(relative_error(ours_NT, theirs_NT).sum())
            else:
                cosine_N = torch.nn.functional.cosine_similarity(ours_NT, theirs_NT, dim=-1)
                of_blocks.append((1 - cosine_N).sum())
        return torch.stack(of_blocks).mean()
