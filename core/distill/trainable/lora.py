"""Low-rank updates (LoRA, DoRA): beside frozen matrices, through ``peft``, and merged into them at the end.

LoRA: W + (alpha / r) · B A; DoRA: the same direction, with a learned length for each column. Fused experts get one pair
per expert (``peft``'s ``target_parameters``), for which there is no DoRA. Merging must give the same outputs, or it is
refused. Matrices that an earlier step cast to 16 bits are rounded to them after the merge: what that undoes is reported.
Quantized ones are not ``peft``'s: see ``lora_on_grid``. There is no DoRA for those, as rounding would undo most of it.

https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.distill.trainable.following import forms_of
from core.distill.trainable.full import WIDE_ENOUGH, small
from core.distill.trainable.lora_on_grid import LowRankOnGrid, following
from core.distill.trainable.on_grid import on_own_grid
from core.distill.trainable.trainable import Parameters, Trainable, TrainableSettings
from core.errors import CannotCompress
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.saving.description import settle
from core.saving.proof import expect
from core.saving.storable import storable

if TYPE_CHECKING:
    from torch import Tensor

ALL = "all-linear"
MERGED_WITHIN = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}
"""Largest difference of outputs that merging may make, as a share of the largest output."""


class LowRank(Parameters):
    """The updates of one ``peft`` adapter."""

    def __init__(self, tuner: Any, chosen: Sequence[Target]) -> None:
        self.tuner, self.chosen = tuner, list(chosen)
        super().__init__({name: p for name, p in tuner.model.named_parameters() if p.requires_grad})

    def finish(self, loaded: LoadedModel) -> tuple[str, ...]:
        """Merge, check, and round to 16 bits what is stored so; see ``Trainable``."""
        self.rest()
        before = _output(loaded)
        model = self.tuner.merge_and_unload(safe_merge=True)
        assert model is loaded.model
        after = _output(loaded)
        difference = float((after - before).abs().max() / before.abs().max())
        if not difference <= MERGED_WITHIN[loaded.dtype]:
            raise CannotCompress(
                f"merging the low-rank updates changes the outputs by {difference:.2g} of the largest, where "
                f"{MERGED_WITHIN[loaded.dtype]:.0e} is allowed; lower learning_rate or lora_alpha"
            )
        notes = [
            f"Low-rank updates merged: outputs equal those before within {difference:.1g} of the largest."
        ]
        stored = storable(loaded)
        moved = lost = 0.0
        for target in self.chosen:
            parameter = loaded.model.get_parameter(target.name)
            packed = loaded.packed.get(target.module)
            if packed is None:
                parameter.data = stored(parameter.data)
                continue
            merged = parameter.data.float()
            moved += float((merged - packed.dequantize().float()).square().sum(dtype=torch.float64))
            again = loaded.packed[target.module] = on_own_grid(merged, packed)
            parameter.data = again.dequantize().to(parameter.dtype)
            lost += float((merged - parameter.data.float()).square().sum(dtype=torch.float64))
        if moved:
            notes.append(_said(moved, lost, after, _output(loaded)))
        return tuple(notes)


class Both(Parameters):
    """Updates of a model of which only some matrices are quantized."""

    def __init__(self, merged: LowRank, on_grid: LowRankOnGrid) -> None:
        self.merged, self.on_grid = merged, on_grid
        super().__init__({**merged.parameters, **on_grid.parameters})

    def before_forward(self) -> None:
        """See ``Trainable``."""
        self.on_grid.before_forward()

    def finish(self, loaded: LoadedModel) -> tuple[str, ...]:
        """See ``Trainable``."""
        return (*self.on_grid.finish(loaded), *self.merged.finish(loaded))


def prepare(loaded: LoadedModel, settings: TrainableSettings) -> Trainable:
    """Updates of the matrices that ``lora_targets`` names; of quantized ones behind their rounding, with norms and biases.

    Raises ``CannotCompress`` for names without a matrix, and for DoRA of what is quantized or fused.
    """
    if loaded.packed:
        settle(loaded)
    chosen = _chosen(loaded, settings.lora_targets)
    coarse = [target for target in chosen if _is_coarse(loaded, target)]
    if not coarse:
        return _merged(loaded, chosen, settings)
    if settings.train == "dora":
        stored = forms_of(loaded.packed[coarse[0].module])[0].scheme.label
        raise CannotCompress(
            f"{coarse[0].module} is stored as {stored}: DoRA is learned in full precision, and putting it back on that grid "
            "would undo most of it; choose lora, scales_and_norms or straight_through, which learn on the grid"
        )
    rest, beside = [target for target in chosen if target not in coarse], small(loaded)
    merged = _merged(loaded, rest, settings) if rest else None
    on_grid = following(loaded, [target.module for target in coarse], beside, settings)
    return on_grid if merged is None else Both(merged, on_grid)


def _is_coarse(loaded: LoadedModel, target: Target) -> bool:
    packed = loaded.packed.get(target.module)
    return packed is not None and any(form.scheme.bits < WIDE_ENOUGH for form in forms_of(packed))


def _merged(loaded: LoadedModel, chosen: Sequence[Target], settings: TrainableSettings) -> LowRank:
    """Updates through ``peft``."""
    from peft import LoraConfig, LoraModel

    experts = [target.name for target in chosen if target.layout == "experts"]
    dora = settings.train == "dora"
    if dora and experts:
        raise CannotCompress(
            f"{experts[0]} holds all experts of a layer in one tensor, for which peft has no DoRA; choose lora, or name "
            "other modules in lora_targets"
        )
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # a float does as well
        use_dora=dora,
        target_modules=[target.module for target in chosen if target.layout != "experts"],
        target_parameters=experts or None,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it transposes Conv1D, as it should
        torch.manual_seed(settings.seed)
        tuner = LoraModel(loaded.model, config, "default")
    return LowRank(tuner, chosen)


def _chosen(loaded: LoadedModel, named: str) -> list[Target]:
    """Matrices of the blocks: all, or those whose module's name ends so."""
    offered = [
        target
        for target in targets(loaded)
        if target.layer is not None and target.layout in ("linear", "conv1d", "experts")
    ]
    if named.strip() == ALL:
        return offered
    ends = [end.strip() for end in named.split(",") if end.strip()]
    of = {end: [t for t in offered if t.module == end or t.module.endswith(f".{end}")] for end in ends}
    unknown = [end for end, found in of.items() if not found]
    if unknown or not ends:
        known = ", ".join(sorted({target.module.rpartition(".")[2] for target in offered}))
        said = f"no matrix of this model ends in {unknown[0]!r}" if unknown else "it names nothing"
        raise CannotCompress(f"lora_targets={named}: {said}; choose {ALL}, or from {known}")
    chosen = {target.name for found in of.values() for target in found}
    return [target for target in offered if target.name in chosen]


def _output(loaded: LoadedModel) -> Tensor:
    """What the model gives for the reload proof's inputs."""
    output = expect(loaded).output
    assert output is not None
    return output.float()


def _said(moved: float, lost: float, exact: Tensor, rounded: Tensor) -> str:
    error = float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    return (
        "Merged matrices were rounded to the 16 bits they are stored in: that moved them by "
        f"{(lost / moved) ** 0.5:.0%} of the size of the update, and the outputs by {error:.2g} of their root mean square."
    )
