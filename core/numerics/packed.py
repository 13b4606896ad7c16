"""A weight in the form it is stored in, and the dense values a reload of it gives.

Knows compressed-tensors' names for the parts of a weight; does not know files or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.packing import pack
from core.numerics.schemes import FloatScheme, IntegerScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A weight as codes and scales (integer grid) or as narrow floats.

    Legend: ``R`` leading axes, ``C`` columns, ``G`` groups of a row.
    """

    codes: Tensor
    """[R, C]: signed int8 codes, or the narrow floats themselves."""
    scale: Tensor | None
    """[R, G] in the dtype they are stored in; None for floats."""
    zero_point: Tensor | None
    """[R, G] int8, on the same signed range as the codes; None when symmetric or float."""
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """The weight [R, C], in the scale's dtype: compressed-tensors multiplies there, and so must we."""
        if self.scale is None:
            return self.codes
        groups_RGK = self.codes.reshape(*self.scale.shape, -1).to(self.scale.dtype)
        if self.zero_point is not None:
            groups_RGK -= self.zero_point.unsqueeze(-1)
        return groups_RGK.mul_(self.scale.unsqueeze(-1)).flatten(-2)

    def stored(self) -> dict[str, Tensor]:
        """The tensors a file holds for this 2-D weight, by compressed-tensors' names.

        Zero points are packed down the rows, not along them.
        """
        if not isinstance(self.scheme, IntegerScheme):
            return {"weight": self.codes}
        assert self.scale is not None
        parts = {
            "weight_packed": pack(self.codes, self.scheme.bits),
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if self.zero_point is not None:
            parts["weight_zero_point"] = pack(self.zero_point.T, self.scheme.bits).T.contiguous()
        return parts


def narrow(weight_RC: Tensor, scheme: FloatScheme) -> PackedTensor:
    """Round every value to the nearest narrow float, ties to even; values must be in its range."""
    return PackedTensor(weight_RC.to(getattr(torch, scheme.dtype)), None, None, scheme)
