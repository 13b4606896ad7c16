"""Recovery of a quantized model by its small numbers: scales, norms and biases learn, codes and zero points stay.

W = s · (c - z), and s = s₀ · exp(θ), so that one learning rate suits all scales and none changes its sign. Then

    ∂L/∂θ = Σ ∂L/∂W · ∂W/∂s · s = Σ ∂L/∂W · W

over the values that share s: no codes are needed. Rounding s to what it is stored in is passed straight through.
(Scales alone, end to end: EfficientQAT's second phase, https://arxiv.org/abs/2407.11062.) Powers of two (MX) and floats
without scales cannot learn; of NVFP4 the scale of the whole matrix does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.distill.trainable.following import Following, Rule, add_gradient, forms_of, refuse_no_grid
from core.distill.trainable.full import small
from core.distill.trainable.on_grid import scaled, summed
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.numerics.packed import PackedTensor
from core.numerics.schemes import MxScheme

if TYPE_CHECKING:
    from torch import Tensor


class LearnedScales:
    """The scales of one stored form, as logarithms of how much they changed."""

    def __init__(self, packed: PackedTensor) -> None:
        self.start = packed
        scale = packed.scale if packed.global_scale is None else packed.global_scale
        assert scale is not None
        self.shape = scale.shape
        # A vector: a trainer decays matrices only.
        change = torch.zeros(scale.numel(), dtype=torch.float32, device=scale.device)
        self.learned = {"scale": torch.nn.Parameter(change)}

    def packed(self) -> PackedTensor:
        """The same codes under the scales as they are now."""
        factor = self.learned["scale"].detach().exp().view(self.shape)
        return scaled(self.start, factor)

    def pull(self, weight: Tensor, gradient: Tensor) -> None:
        """See ``Rule``."""
        add_gradient(self.learned["scale"], summed(gradient * weight, self.start).flatten())


def prepare(loaded: LoadedModel) -> Following:
    """Scales, norms and biases; raises ``CannotCompress`` for a model that is not quantized."""
    refuse_no_grid(loaded, "scales_and_norms")
    forms: dict[str, tuple[Rule, ...]] = {}
    for module, packed in loaded.packed.items():
        if all(form.scale is not None and not isinstance(form.scheme, MxScheme) for form in forms_of(packed)):
            forms[module] = tuple(LearnedScales(form) for form in forms_of(packed))
    return Following(loaded, forms, small(loaded))
