"""All losses on what goes on inside two models, as one object that a training objective holds.

Use, for every micro-batch::

    with match.captured():
        student forward pass; teacher forward pass without gradients
    matched = match.loss(batch)

The teacher must really run: cached logits have no inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from core.corpus.batches import IGNORE
from core.distill.features import attention_relations, expert_outputs, hidden_states
from core.distill.features.attention_relations import AttentionRelations
from core.distill.features.expert_outputs import ExpertOutputs
from core.distill.features.feature_loss import FeatureLoss
from core.distill.features.hidden_states import HiddenStates
from core.distill.features.projection import projection
from core.distill.features.reading import Reads, reading
from core.distill.features.router_match import RouterMatch
from core.distill.layer_map import LayerMap
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch

Counted = Literal["targets", "tokens"]


@dataclass(frozen=True, eq=False)
class Matched:
    """The weighted sum over tokens, how many tokens, and each loss's own sum without its weight."""

    loss: Tensor
    n: int
    parts: dict[str, float]


class FeatureMatch:
    """Losses with their weights; reads both models and adds up.

    ``count`` says which tokens count: ``targets``, those with a next token to learn (no prompt, no padding), for
    language; ``tokens``, all that are not padding, where a label or a score is learned.
    """

    def __init__(
        self,
        student: LoadedModel,
        teacher: LoadedModel,
        losses: Sequence[tuple[FeatureLoss, float]],
        *,
        count: Counted,
    ) -> None:
        assert losses, "nothing to match"
        self.student, self.teacher = student, teacher
        self.losses = tuple(losses)
        self.count = count
        self._read: tuple[Reads, Reads] | None = None

    def named_parameters(self) -> list[tuple[str, Any]]:
        """What is learned beside the student, once each; an optimizer must have it, a checkpoint keep it."""
        found = {f"features.{name}": p for loss, _ in self.losses for name, p in loss.parameters.items()}
        return sorted(found.items())

    @contextmanager
    def captured(self) -> Iterator[None]:
        """Read both models while each runs one forward pass. Hold both models' locks."""
        ours = [read for loss, _ in self.losses for read in loss.student_reads]
        theirs = [read for loss, _ in self.losses for read in loss.teacher_reads]
        with reading(self.student, ours) as of_student, reading(self.teacher, theirs) as of_teacher:
            yield
        self._read = (of_student, of_teacher)

    def loss(self, batch: Batch) -> Matched:
        """The weighted sum of all losses on what ``captured`` read last, which is let go."""
        assert self._read is not None, "loss() is called once after each captured()"
        (student, teacher), self._read = self._read, None
        counted_BP = batch.segments_BP > 0
        if self.count == "targets":
            counted_BP = counted_BP & (batch.targets_BP != IGNORE)
        sums = {loss.name: loss.loss(student, teacher, batch, counted_BP) for loss, _ in self.losses}
        weighted = torch.stack([weight * sums[loss.name] for loss, weight in self.losses]).sum()
        parts = {name: float(value.detach()) for name, value in sums.items()}
        return Matched(weighted, int(counted_BP.sum()), parts)


def feature_match(
    student: LoadedModel,
    teacher: LoadedModel,
    layers: LayerMap,
    *,
    count: Counted = "targets",
    hidden_weight: float = 0.0,
    hidden_loss: hidden_states.Kind = "cosine",
    relation_weight: float = 0.0,
    relations: attention_relations.Kind = "attention_and_value",
    relation_heads: int = 0,
    router_weight: float = 0.0,
    expert_weight: float = 0.0,
    expert_loss: expert_outputs.Kind = "together",
) -> FeatureMatch | None:
    """The losses whose weight is not 0; None where there are none. Raises ``BadInput`` where one cannot be had.

    Widths that differ share one projection, learned with the student.
    """
    shared = projection(student, teacher) if hidden_weight or expert_weight else None
    losses: list[tuple[FeatureLoss, float]] = []
    if hidden_weight:
        hidden = HiddenStates(student, teacher, layers, kind=hidden_loss, projection_TS=shared)
        losses.append((hidden, hidden_weight))
    if relation_weight:
        related = AttentionRelations(student, teacher, layers, kind=relations, relation_heads=relation_heads)
        losses.append((related, relation_weight))
    if router_weight:
        losses.append((RouterMatch(student, teacher, layers), router_weight))
    if expert_weight:
        experts = ExpertOutputs(student, teacher, layers, kind=expert_loss, projection_TS=shared)
        losses.append((experts, expert_weight))
    return FeatureMatch(student, teacher, losses, count=count) if losses else None
