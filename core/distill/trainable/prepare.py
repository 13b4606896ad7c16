"""From the setting ``train`` to what moves."""

from __future__ import annotations

from core.distill.trainable import full, lora, scales_and_norms, straight_through
from core.distill.trainable.trainable import Trainable, TrainableSettings
from core.errors import CannotCompress
from core.lazy import torch
from core.models.gradients import leave_inference_mode
from core.models.loaded import LoadedModel
from core.saving.reread import reread


def prepare(loaded: LoadedModel, settings: TrainableSettings) -> Trainable:
    """Make what the settings name trainable, and everything else not. Call it before the model is cast to anything.

    Raises ``CannotCompress`` where this model has nothing of the kind, where it is stored so that it cannot move, and where
    inputs of layers are rounded.
    """
    if loaded.activations:
        raise CannotCompress(
            "this model rounds what its linear layers read (W8A8), a step without derivative, so nothing in it can be "
            "trained; start from a variant that rounds weights only"
        )
    with torch.inference_mode(False):
        leave_inference_mode(loaded)
        if not loaded.packed:  # a variant that was opened: goes on with the codes of its file
            loaded.packed.update(reread(loaded))
        loaded.model.requires_grad_(False)
        match settings.train:
            case "all" | "head" | "norms":
                return full.prepare(loaded, settings)
            case "lora" | "dora":
                return lora.prepare(loaded, settings)
            case "scales_and_norms":
                return scales_and_norms.prepare(loaded)
            case _:
                assert settings.train == "straight_through", f"{settings.train} is no choice of what moves"
                return straight_through.prepare(loaded)
