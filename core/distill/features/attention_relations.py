"""Attention relations of one layer: MiniLM (2002.10957) and MiniLMv2 (2012.15828).

A relation of two sets of vectors is R_p = softmax_q(x_p · y_q · scale), per head and query position p, over the
positions q that attention may look at there: the same text, and for a decoder not later ones, within both windows. The
loss is KL(R of the teacher ‖ R of the student), summed over relations, mean over heads.

* ``attention_and_value`` (v1): the attention distribution itself, softmax(q · kᵀ), and values with values,
  softmax(v · vᵀ / √K). Both models need equally many heads, of any size.
* ``qq_kk_vv`` (v2): queries with queries, keys with keys, values with values. All heads' vectors of a position side by
  side are cut into A relation heads of equal size, so the two models may differ in heads, head size and width.

Compared is the student's last layer with its twin (MiniLM: the teacher's last; for large teachers v2 found a layer
above the middle better, which a listed layer map can say). Queries and keys are those the kernel gets, behind norms and
rotary positions. No projection is needed at any width.

Legend: ``B`` rows, ``P``/``Q`` positions, ``H`` query heads, ``G`` key/value heads, ``A`` heads of a relation, ``K``
their size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from core.distill.features.feature_loss import kl
from core.distill.features.reading import Heads, ReadAttention, Reads
from core.distill.layer_map import LayerMap
from core.errors import BadInput
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch
    from core.models.anatomy import Anatomy

Kind = Literal["attention_and_value", "qq_kk_vv"]
NOT_SEEN = -1e30
"""Score of a pair that attention may not look at; finite, so that a row without any pair gives no NaN."""


class AttentionRelations:
    """Relations of the student's last layer against its twin's."""

    name = "relations"
    parameters: Mapping[str, Any] = {}

    def __init__(
        self,
        student: LoadedModel,
        teacher: LoadedModel,
        layers: LayerMap,
        *,
        kind: Kind,
        relation_heads: int = 0,
    ) -> None:
        ours, theirs = student.anatomy, teacher.anatomy
        self.kind = kind
        self.read = ReadAttention(ours.blocks[-1].attention)
        self.twin = ReadAttention(theirs.blocks[layers.twins[-1]].attention)
        self.student_reads, self.teacher_reads = (self.read,), (self.twin,)
        for loaded in (student, teacher):
            if not loaded.anatomy.has_heads:
                raise BadInput(
                    f"{loaded.ref} ({loaded.anatomy.architecture}) has layers without plain attention heads, so there are "
                    "no relations to match; set relation_weight=0"
                )
        if kind == "attention_and_value" and ours.n_heads != theirs.n_heads:
            raise BadInput(
                f"the student has {ours.n_heads} heads and the teacher {theirs.n_heads}, whose attention cannot be matched "
                "head by head; choose relations=qq_kk_vv"
            )
        self.n_relation_heads = _relation_heads(ours, theirs, relation_heads) if kind == "qq_kk_vv" else 0
        windows = [w for w in (ours.windows[-1], theirs.windows[layers.twins[-1]]) if w is not None]
        self.window = min(windows, default=None)
        self.causal = ours.family == "decoder"

    def loss(self, student: Reads, teacher: Reads, batch: Batch, counted_BP: Tensor) -> Tensor:
        """Sum over tokens of the mean over heads, of all relations."""
        seen_BPQ = self._seen(batch.segments_BP)
        ours = self._scores(student[self.read])
        theirs = self._scores(teacher[self.twin])
        total = ours[0].new_zeros(())
        for ours_BAPQ, theirs_BAPQ in zip(ours, theirs, strict=True):
            log_p, log_q = (
                scores.float().masked_fill(~seen_BPQ[:, None], NOT_SEEN).log_softmax(-1)
                for scores in (theirs_BAPQ.detach(), ours_BAPQ)
            )
            total = total + kl(log_p, log_q).mean(1)[counted_BP].sum()
        return total

    def _seen(self, segments_BP: Tensor) -> Tensor:
        """Pairs (p, q) where attention may look from p at q, [B, P, Q]."""
        seen_BPQ = (segments_BP[:, :, None] == segments_BP[:, None, :]) & (segments_BP[:, None, :] > 0)
        place_P = torch.arange(segments_BP.shape[1], device=segments_BP.device)
        back_PQ = place_P[:, None] - place_P[None, :]
        if self.causal:
            seen_BPQ = seen_BPQ & (back_PQ >= 0)
        if self.window is not None:
            seen_BPQ = seen_BPQ & (back_PQ.abs() < self.window)
        return seen_BPQ

    def _scores(self, heads: Heads) -> tuple[Tensor, ...]:
        """Scores of each relation before the mask, [B, A, P, Q]."""
        if self.kind == "attention_and_value":
            key, value = (_to_query_heads(x, heads.query.shape[1]) for x in (heads.key, heads.value))
            scores = heads.query @ key.mT * heads.scaling
            if heads.softcap is not None:
                scores = torch.tanh(scores / heads.softcap) * heads.softcap
            return scores, value @ value.mT * value.shape[-1] ** -0.5
        # OPT scales its queries before they are read: undone, they are like the others'.
        query = heads.query * (heads.scaling * math.sqrt(heads.query.shape[-1]))
        cut = (_cut(x, self.n_relation_heads) for x in (query, heads.key, heads.value))
        return tuple(x @ x.mT * x.shape[-1] ** -0.5 for x in cut)


def _to_query_heads(x_BGPK: Tensor, n_heads: int) -> Tensor:
    """Entry h is what query head h reads."""
    return x_BGPK.repeat_interleave(n_heads // x_BGPK.shape[1], dim=1)


def _cut(x_BHPK: Tensor, n_relation_heads: int) -> Tensor:
    """All heads of a position side by side, cut into relation heads, [B, A, P, K]."""
    side_by_side = x_BHPK.transpose(1, 2).flatten(2)
    return side_by_side.view(*side_by_side.shape[:2], n_relation_heads, -1).transpose(1, 2)


def _relation_heads(ours: Anatomy, theirs: Anatomy, wanted: int) -> int:
    """Relation heads that divide queries and keys of both models; 0 asks for as many as fit the teacher's heads."""
    widths = [a.head_dim * n for a in (ours, theirs) for n in (a.n_heads, a.n_kv_heads)]
    most = math.gcd(*widths)
    n = wanted or math.gcd(most, theirs.n_kv_heads)
    if most % n:
        raise BadInput(
            f"relation_heads={n} does not divide {', '.join(map(str, sorted(set(widths))))}, the widths of both models' "
            f"queries and keys; choose a divisor of {most}"
        )
    return n
