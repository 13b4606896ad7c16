"""Low-rank updates of quantized matrices, learned behind their rounding: what is trained is what is stored.

A low-rank update that is learned in full precision and rounded at the end is mostly lost: on a coarse grid it is smaller
than half a step nearly everywhere. Here the weight is rounded after every update (``behind_rounding``), and the gradient
goes on to A and B. Scales, norms and biases learn beside it, as with ``straight_through``, whose R · C exact values
(R + C) · r numbers replace. Rounding errors are of full rank: where they are all that is to be undone, scales and norms
alone do as well at few tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from core.distill.trainable.behind_rounding import behind_rounding
from core.distill.trainable.exact_weight import LowRankUpdate
from core.distill.trainable.following import Following, Rule, forms_of
from core.distill.trainable.on_grid import step_of
from core.distill.trainable.trainable import TrainableSettings
from core.lazy import torch
from core.models.loaded import LoadedModel

if TYPE_CHECKING:
    from torch import Generator

    from core.numerics.packed import PackedTensor


class LowRankOnGrid(Following):
    """Quantized weights that follow from low-rank updates."""

    def finish(self, loaded: LoadedModel) -> tuple[str, ...]:
        """Say how many codes are others than before; see ``Trainable``."""
        before = {weight.module: forms_of(loaded.packed[weight.module]) for weight in self.weights}
        super().finish(loaded)
        changed = total = 0
        for module, was in before.items():
            for old, new in zip(was, forms_of(loaded.packed[module]), strict=True):
                changed += int((old.codes.view(torch.int8) != new.codes.view(torch.int8)).sum())
                total += old.codes.numel()
        return (
            f"Low-rank updates were learned behind the rounding: {changed / total:.2%} of codes changed.",
        )


def following(
    loaded: LoadedModel, modules: Iterable[str], beside: Mapping[str, Any], settings: TrainableSettings
) -> LowRankOnGrid:
    """Updates of these quantized modules, and what else moves."""
    drawn = torch.Generator().manual_seed(settings.seed)
    forms = {
        module: tuple(_rule(form, settings, drawn) for form in forms_of(loaded.packed[module]))
        for module in modules
    }
    return LowRankOnGrid(loaded, forms, beside)


def _rule(packed: PackedTensor, settings: TrainableSettings, drawn: Generator) -> Rule:
    start_RC = packed.dequantize().float()
    update = LowRankUpdate(
        start_RC, step_of(packed), rank=settings.lora_rank, alpha=settings.lora_alpha, drawn=drawn
    )
    return behind_rounding(packed, update)
