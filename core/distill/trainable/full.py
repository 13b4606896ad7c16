"""Training a model's own parameters: all of them, those behind the last layer, or norms and biases only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.distill.trainable.trainable import Parameters, TrainableSettings
from core.errors import CannotCompress
from core.models.loaded import LoadedModel
from core.models.sizes import block_of, component_of
from core.models.targets import Target, targets
from core.numerics.packed import PackedExperts, PackedTensor, narrow
from core.numerics.schemes import FloatScheme
from core.saving.storable import storable

if TYPE_CHECKING:
    from torch import Tensor

WIDE_ENOUGH = 16
"""Bits of a float whose rounding, once at the end of a training, costs nothing that can be seen."""


class OwnParameters(Parameters):
    """Weights of the model themselves."""

    def finish(self, loaded: LoadedModel) -> tuple[str, ...]:
        """Round matrices as the base's file has them, or as an earlier step stored them; see ``Trainable``."""
        stored, rounded = storable(loaded), 0.0
        for name, parameter in self.parameters.items():
            before: Tensor = parameter.detach()
            packed = loaded.packed.get(name.removesuffix(".weight"))
            if isinstance(packed, PackedTensor):
                assert isinstance(packed.scheme, FloatScheme)
                again = loaded.packed[name.removesuffix(".weight")] = narrow(before, packed.scheme)
                parameter.data = again.dequantize().to(before.dtype)
            elif before.ndim > 1:
                parameter.data = stored(before)
            rounded = max(rounded, float((parameter.detach() - before).abs().max()))
        self.rest()
        if not rounded:
            return ()
        return (f"Trained weights were rounded to 16 bits as the file has them: by {rounded:.2g} at most.",)


def prepare(loaded: LoadedModel, settings: TrainableSettings) -> OwnParameters:
    """All parameters, those behind the last layer (``head``), or norms and biases (``norms``).

    Raises ``CannotCompress`` where there are none, or where an earlier step put one of them on a coarser grid than
    16-bit floats have.
    """
    own = dict(loaded.model.named_parameters())
    chosen = [
        target for target in targets(loaded) if _moves(loaded, target, own[target.name], settings.train)
    ]
    if not chosen:
        raise CannotCompress(f"{loaded.anatomy.architecture} has no parameters for train={settings.train}")
    _refuse_on_grid(loaded, chosen, settings.train)
    return OwnParameters({target.name: own[target.name] for target in chosen})


def small(loaded: LoadedModel) -> dict[str, Any]:
    """Norms and biases by name: what no format stores in fewer bits."""
    own: Mapping[str, Any] = dict(loaded.model.named_parameters())
    return {t.name: own[t.name] for t in targets(loaded) if _moves(loaded, t, own[t.name], "norms")}


def _moves(loaded: LoadedModel, target: Target, parameter: Any, train: str) -> bool:
    if train == "all":
        return True
    if train == "norms":
        return target.component == "norm" or (target.name.endswith("bias") and parameter.ndim == 1)
    assert train == "head", f"{train} is not a choice of own parameters"
    anatomy = loaded.anatomy
    if block_of(anatomy, target.name) is not None:
        return False
    if component_of(anatomy, target.name) == "embedding":
        return anatomy.tied and target.module == anatomy.embedding
    return (
        target.module.rpartition(".")[0] != anatomy.embedding_norm and target.module != anatomy.embedding_norm
    )


def _refuse_on_grid(loaded: LoadedModel, chosen: list[Target], train: str) -> None:
    for target in chosen:
        packed = loaded.packed.get(target.module)
        if packed is None:
            continue
        plain = not isinstance(packed, PackedExperts) and packed.scale is None
        if not plain or packed.schemes[0].bits < WIDE_ENOUGH:
            raise CannotCompress(
                f"{target.module} is stored as {packed.schemes[0].label}: with train={train} it would leave its grid and be "
                "rounded back at the end; choose scales_and_norms, straight_through or lora, or train first and "
                "quantize last"
            )
