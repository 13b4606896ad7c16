"""From the setting ``train`` to what moves."""

from __future__ import annotations

from core.distill.trainable import full, scales_and_norms, straight_through
from core.distill.trainable.trainable import Trainable, TrainableSettings
from core.errors import BadInput
from core.lazy import torch
from core.models.gradients import leave_inference_mode
from core.models.loaded import LoadedModel


def prepare(loaded: LoadedModel, settings: TrainableSettings) -> Trainable:
    """Make what the settings name trainable, and everything else not. Call it before the model is cast to anything.

    Raises ``CannotCompress`` where this model has nothing of the kind, or its weights are stored so that it cannot move.
    """
    with torch.inference_mode(False):
        leave_inference_mode(loaded)
        loaded.model.requires_grad_(False)
        match settings.train:
            case "all" | "head" | "norms":
                return full.prepare(loaded, settings)
            case "scales_and_norms":
                return scales_and_norms.prepare(loaded)
            case "straight_through":
                return straight_through.prepare(loaded)
            case _:
                raise BadInput(f"train={settings.train}: not known")
