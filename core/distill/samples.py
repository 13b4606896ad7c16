"""What a student writes while it learns: greedy continuations of held-out texts. Knows no loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from core.corpus.batches import TrainingData

PROMPT = 24
"""Tokens of a held-out text that are given."""
WRITTEN = 24
"""Tokens the model goes on with, at most."""


def continuations(loaded: LoadedModel, data: TrainingData, rows: list[int]) -> list[tuple[str, str]]:
    """(prompt, continuation) for the beginning of the first text of each row; none for a model that predicts no tokens."""
    if loaded.family != "decoder" or loaded.anatomy.unembedding is None:
        return []
    found = []
    for row in rows:
        batch = data.batch([row])
        first = batch.ids_BP[0, batch.segments_BP[0] == 1]
        prompt_BP = first[: min(PROMPT, max(1, len(first) // 2))][None].to(loaded.model.device)
        with torch.no_grad():
            whole_BP = loaded.model.generate(
                prompt_BP, attention_mask=torch.ones_like(prompt_BP), do_sample=False, max_new_tokens=WRITTEN,
                pad_token_id=data.pad_id,
            )  # fmt: skip
        texts = [
            loaded.tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[union-attr]
            for ids in (prompt_BP[0], whole_BP[0, prompt_BP.shape[1] :])
        ]
        found.append((texts[0], texts[1]))
    return found
