"""A vision model's answer: one logit per class. Refuses models that name no classes, and answers that are no numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import CannotMeasure
from core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel


def refuse_without_classes(loaded: LoadedModel) -> None:
    """Raise ``CannotMeasure`` for a vision model without a classifier."""
    if not loaded.anatomy.architecture.endswith("ForImageClassification"):
        raise CannotMeasure(
            f"{loaded.ref} is a {loaded.anatomy.architecture}, which names no classes; open an image classifier"
        )


def class_logits(loaded: LoadedModel, pixels_NCHW: Tensor) -> Tensor:
    """Class logits [N, classes] in float32 or wider; raises ``CannotMeasure`` where there are none or not finite ones."""
    refuse_without_classes(loaded)
    logits_NC: Tensor = loaded.model(pixel_values=pixels_NCHW).logits
    if not torch.isfinite(logits_NC).all():
        bad = int((~torch.isfinite(logits_NC).all(-1)).int().argmax())
        raise CannotMeasure(
            f"{loaded.ref} gives class logits that are not finite (NaN or infinity) for picture {bad + 1} of "
            f"{len(logits_NC)}; open it in float32, or check its weights"
        )
    return logits_NC if logits_NC.dtype == torch.float64 else logits_NC.float()
