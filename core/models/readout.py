"""From a residual stream to logits: the model's own final norm, unembedding, scale and softcap, reused.

This is the logit lens' last step. Applied to the final residual it gives the model's logits bit for bit
(identity 2 of ``anatomy_verify.py``), because it calls the same modules on the same tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.errors import CannotMeasure
from core.lazy import torch
from core.models.anatomy import Anatomy

if TYPE_CHECKING:
    from torch import Tensor


def unembed(model: Any, anatomy: Anatomy, residual: Tensor) -> Tensor:
    """Logits [..., vocab] of a residual stream [..., d_model], taken before the final norm.

    For a ViT pass the CLS position's residual. Raises ``CannotMeasure`` for a model without a head.
    """
    if anatomy.unembedding is None:
        raise CannotMeasure(
            f"{anatomy.architecture} has no unembedding: a residual cannot be read as tokens; open a model with a head"
        )
    for path in (anatomy.final_norm, anatomy.head_transform):
        if path is not None:
            residual = model.get_submodule(path)(residual)
    return finish_logits(anatomy, model.get_submodule(anatomy.unembedding)(residual))


def classify(model: Any, anatomy: Anatomy, residual_BPD: Tensor, ids_BP: Tensor) -> Tensor:
    """Class logits [B, classes] of a text classifier from its last residual stream, as its own modules give them."""
    assert anatomy.classifier is not None
    head = model.get_submodule(anatomy.classifier)
    if not anatomy.causal:
        pooled = residual_BPD if anatomy.pooler is None else model.get_submodule(anatomy.pooler)(residual_BPD)
        logits_BC: Tensor = head(pooled)
        return logits_BC
    assert anatomy.final_norm is not None
    logits_BPC = head(model.get_submodule(anatomy.final_norm)(residual_BPD))
    padding = model.config.get_text_config().pad_token_id
    positions_BP = torch.arange(ids_BP.shape[1], device=ids_BP.device) * (
        ids_BP != (-1 if padding is None else padding)
    )
    answered: Tensor = logits_BPC[torch.arange(len(ids_BP)), positions_BP.argmax(-1)]
    return answered


def finish_logits(anatomy: Anatomy, logits: Tensor) -> Tensor:
    """Apply the logit scale and softcap in the order the models do: logits → softcap · tanh(logits / softcap)."""
    if anatomy.logit_divisor != 1.0:
        logits = logits / anatomy.logit_divisor
    elif anatomy.logit_scale != 1.0:
        logits = logits * anatomy.logit_scale
    if anatomy.logit_softcap is not None:
        logits = torch.tanh(logits / anatomy.logit_softcap) * anatomy.logit_softcap
    return logits
