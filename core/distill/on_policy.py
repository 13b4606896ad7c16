"""Texts that the student continues itself, so that it learns where its own words lead (GKD, arXiv 2306.13649).

Trained on given text only, a student never sees the contexts that its own mistakes make. On a share of the batches the
end of every row is replaced by the student's continuation, drawn at temperature 1, and the teacher, which must run,
judges those tokens and no others. Draws come from torch's own generator, which the trainer seeds for every batch.

Legend: B rows, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from core.distill.live_teacher import LiveTeacher
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from core.corpus.batches import Batch

KEPT = 0.5
"""Share of a text that is given, where it has no prompt of its own."""


@dataclass(frozen=True, eq=False)
class OnPolicy:
    """The student as a writer and the teacher as its reader; ``share`` of the batches are continued."""

    student: LoadedModel
    teacher: LiveTeacher
    share: float

    def drawn(self) -> bool:
        """Whether this batch is one of them."""
        return bool(torch.rand(()) < self.share)

    def continued(self, batch: Batch) -> Batch:
        """The first text of every row: its prompt, or its first half, and behind it what the student says.

        As long as the text was. Its targets are the continuation's tokens, up to an end of text the student says.
        """
        from core.corpus.batches import IGNORE

        first_BP = batch.segments_BP == 1
        lengths_B = first_BP.sum(-1)
        learned_BP = first_BP & (batch.targets_BP != IGNORE)
        prompts_B = torch.where(learned_BP.any(-1), learned_BP.int().argmax(-1) + 1, lengths_B)
        # Learned from its first token on, or (a document that goes on behind a special token) its second: no prompt.
        whole_B = prompts_B <= 2
        prompts_B = torch.where(whole_B, (lengths_B * KEPT).ceil().long().clamp_min(1), prompts_B)
        ids_BP = self._written(batch.ids_BP, prompts_B, lengths_B)
        places_P = torch.arange(ids_BP.shape[1], device=ids_BP.device)
        inside_BP = places_P < lengths_B[:, None]
        aimed_BP = (places_P + 1 >= prompts_B[:, None]) & (places_P + 1 < lengths_B[:, None])
        if (end := getattr(self.student.tokenizer, "eos_token_id", None)) is not None:
            ended_BP = (ids_BP == end) & (places_P >= prompts_B[:, None])
            aimed_BP &= ended_BP.cumsum(-1) == 0
        next_BP = torch.cat((ids_BP[:, 1:], ids_BP[:, :1]), -1)
        return replace(
            batch,
            ids_BP=ids_BP,
            segments_BP=inside_BP.long(),
            positions_BP=places_P.expand_as(ids_BP).contiguous(),
            targets_BP=torch.where(aimed_BP, next_BP, IGNORE),
            labels_B=None,
        )

    def _written(self, ids_BP: Tensor, prompts_B: Tensor, lengths_B: Tensor) -> Tensor:
        """Ids with everything from each row's prompt on drawn from the student, one position after the other.

        Rows start together and end apart: a row that still reads its prompt is given it, one that is through is written
        on to. The cache holds what was read, so every position is computed once.
        """
        model = self.student.model
        written_BP = ids_BP[:, : int(lengths_B.max())].clone()
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                start = int(prompts_B.min())
                read = model(input_ids=written_BP[:, :start], use_cache=True)
                for place in range(start, written_BP.shape[1]):
                    drawn_B = torch.multinomial(read.logits[:, -1].float().softmax(-1), 1)[:, 0]
                    free_B = (place >= prompts_B) & (place < lengths_B)
                    written_BP[:, place] = torch.where(free_B, drawn_B, written_BP[:, place])
                    if place + 1 < written_BP.shape[1]:
                        read = model(
                            input_ids=written_BP[:, place : place + 1],
                            past_key_values=read.past_key_values,
                            use_cache=True,
                        )
        finally:
            model.train(training)
        return written_BP
