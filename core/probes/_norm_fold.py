"""Norms as linear maps: with its scale frozen at its real value, a norm of a sum is the sum of its parts' norms.

Legend: D d_model, N rows of a weight.

A LayerNorm with σ frozen maps a part c to γ ⊙ (c − mean c) / σ, an RMSNorm to γ ⊙ c / σ (Gemma: 1 + γ), and adds
its β once (Elhage 2021, "A Mathematical Framework for Transformer Circuits"). So how much a part adds to a logit is
its dot product with one *direction*: the unembedding's row pulled back through the frozen norm. Nothing is folded
into weights: they are only read, in float64, a bounded number of rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.errors import CannotMeasure
from core.lazy import torch
from core.models.anatomy_verify import TOLERANCE

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Weights are widened to float64 this many elements at a time: 32 MiB."""


@dataclass(frozen=True)
class FrozenNorm:
    """A norm at one position: part c ↦ scale ⊙ (c − mean c, if centred); ``shift`` is added once."""

    scale_D: Tensor
    centred: bool
    shift_D: Tensor | None

    def pull(self, direction_D: Tensor) -> Tensor:
        """The direction before the norm whose dot product with a part is that of ``direction_D`` after it."""
        pulled_D = direction_D * self.scale_D
        return pulled_D - pulled_D.mean() if self.centred else pulled_D

    def apply(self, parts_ND: Tensor) -> Tensor:
        """What parts become behind the norm, its own bias left out."""
        centred_ND = parts_ND - parts_ND.mean(-1, keepdim=True) if self.centred else parts_ND
        return centred_ND * self.scale_D

    def constant(self, direction_D: Tensor) -> float:
        """What the norm's own bias adds along ``direction_D``."""
        return 0.0 if self.shift_D is None else float(direction_D @ self.shift_D)


def freeze(norm: Any, path: str, *, offset: float, fed_D: Tensor, output_D: Tensor) -> FrozenNorm:
    """Freeze a norm at the position where it was fed ``fed_D`` and gave ``output_D``.

    An RMSNorm's scale is read off its own output (output / input), so that the rounding it does inside, float32 even
    in a float64 model, is part of the frozen map; its formula must agree. Raises ``CannotMeasure`` when the module is
    not γ / σ: ``offset`` is what the architecture adds to γ.
    """
    tolerance = TOLERANCE[str(output_D.dtype).removeprefix("torch.")]
    fed_D, output_D = fed_D.double(), output_D.double()
    centred = isinstance(norm, torch.nn.LayerNorm)
    bias = getattr(norm, "bias", None)
    shift_D = None if bias is None else bias.double()
    centred_D = fed_D - fed_D.mean() if centred else fed_D
    epsilon = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    sigma = (centred_D.square().mean() + epsilon).sqrt()
    scale_D = (norm.weight.double() + offset) / sigma
    expected_D = centred_D * scale_D + (0 if shift_D is None else shift_D)
    gap = float((expected_D - output_D).norm() / output_D.norm().clamp_min(1e-12))
    if not gap <= tolerance:
        raise CannotMeasure(
            f"{path} is not γ ⊙ x / σ (relative difference {gap:.2g}), so logits cannot be split into parts here; "
            "this model's anatomy is not understood: open it again"
        )
    if not centred and shift_D is None:
        scale_D = torch.where(fed_D != 0, output_D / fed_D, scale_D)
    return FrozenNorm(scale_D, centred, shift_D)


def project(weight_ND: Tensor, direction_D: Tensor) -> Tensor:
    """``weight · direction`` in float64, [N], whatever the weight's dtype; the weight is never copied whole."""
    rows = max(1, CHUNK_ELEMENTS // weight_ND.shape[-1])
    return torch.cat([part.double() @ direction_D for part in torch.split(weight_ND, rows)])
