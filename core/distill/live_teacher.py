"""A teacher that runs beside its student: it reads every batch, and its logits are made where they are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from core.distill.head import Head, head_of
from core.distill.teacher_rows import TeacherRows, Unread
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch


class Teacher(Protocol):
    """Says of a batch what comes next at every target, targets in the batch's own order."""

    def rows(self, batch: Batch) -> TeacherRows:
        """What it says at the batch's targets."""


def final_hidden(loaded: LoadedModel, batch: Batch) -> Tensor:
    """What the head reads at every target of ``batch``, [N, D], behind the final norm. ``batch`` on the model's device."""
    from core.corpus.batches import IGNORE

    model, norm = loaded.model, loaded.anatomy.final_norm
    body = model.base_model
    if (
        body is model and norm is not None
    ):  # Llama 4's text model names no body: it is what has the final norm
        body = model.get_submodule(norm.rpartition(".")[0])
    hidden_BPD = body(**batch.inputs("decoder")).last_hidden_state
    found_ND: Tensor = hidden_BPD[batch.targets_BP != IGNORE]
    return found_ND


def targets_of(batch: Batch) -> Tensor:
    """The token that comes next at every target of ``batch`` [N], in its order."""
    from core.corpus.batches import IGNORE

    return batch.targets_BP[batch.targets_BP != IGNORE]


class LiveTeacher:
    """A teacher in memory, over the whole vocabulary."""

    def __init__(self, loaded: LoadedModel, *, vocabulary: int | None = None) -> None:
        self.loaded = loaded
        self.head: Head = head_of(loaded, vocabulary=vocabulary)

    def rows(self, batch: Batch) -> Unread:
        """One forward pass without its head, which is read in parts by the loss."""
        with torch.no_grad():
            return Unread(final_hidden(self.loaded, batch.to(self.loaded.model.device)), self.head)
