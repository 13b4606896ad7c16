"""Low-rank updates beside frozen matrices (LoRA, DoRA), through ``peft``, and merged into them at the end.

LoRA: W + (alpha / r) · B A; DoRA: the same direction, with a learned length for each column. Fused experts get one pair
per expert (``peft``'s ``target_parameters``), for which there is no DoRA. Merging must give the same outputs, or it is
refused. A matrix that an earlier step quantized is put back on its own grid, scales kept, after the merge: what that
undoes is reported, and is most of a small update where the grid is coarse.

https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2402.09353
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.distill.trainable.on_grid import on_own_grid
from core.distill.trainable.trainable import Parameters, TrainableSettings
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
        """Merge, check, and put what was quantized back on its grid; see ``Trainable``."""
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


def prepare(loaded: LoadedModel, settings: TrainableSettings) -> LowRank:
    """Updates of the matrices that ``lora_targets`` names; raises ``CannotCompress`` for names without one, and for DoRA
    of fused experts."""
    from peft import LoraConfig, LoraModel

    if loaded.packed:
        settle(loaded)
    chosen = _chosen(loaded, settings.lora_targets)
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
        "Quantized matrices were put back on their own grids after the merge, scales kept: rounding moved them by "
        f"{(lost / moved) ** 0.5:.0%} of the size of the update, and the outputs by {error:.2g} of their root mean square."
    )
