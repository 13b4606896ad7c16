"""Sentence vectors of an encoder: token vectors pooled as its checkpoint says, then normalised.

The same as sentence-transformers' Transformer → Pooling → Normalize, without the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.errors import CannotMeasure
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 32


def embed(loaded: LoadedModel, texts: Sequence[str], *, max_tokens: int = 256) -> Tensor:
    """Unit vectors [text, d_model] (float32, on the CPU); texts are cut at ``max_tokens``.

    Raises ``CannotMeasure`` for a model that is not an encoder with a tokenizer.
    """
    if not loaded.supports(("encoder", "text")):
        raise CannotMeasure(
            f"{loaded.ref} is a {loaded.family}, sentence vectors need an encoder with a tokenizer; open one, "
            "e.g. demo:minilm"
        )
    batches = [list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    with loaded.lock, torch.inference_mode():
        return torch.cat([_embed_batch(loaded, batch, max_tokens) for batch in batches])


def _embed_batch(loaded: LoadedModel, texts: list[str], max_tokens: int) -> Tensor:
    assert loaded.tokenizer is not None
    limit = min(max_tokens, loaded.anatomy.context_length)
    batch = loaded.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    batch = batch.to(loaded.model.device)
    tokens_BPD = loaded.model.base_model(**batch).last_hidden_state.float()
    if loaded.pooling == "cls":
        pooled_BD = tokens_BPD[:, 0]
    else:
        mask_BP1 = batch["attention_mask"].unsqueeze(-1).float()
        pooled_BD = (tokens_BPD * mask_BP1).sum(1) / mask_BP1.sum(1)
    unit_BD: Tensor = torch.nn.functional.normalize(pooled_BD, dim=-1).cpu()
    return unit_BD
