"""A weight in the form it is stored in, and the dense values a reload of it gives.

Knows compressed-tensors' names for the parts of a weight; does not know files or models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.packing import pack
from core.numerics.schemes import FloatScheme, IntegerScheme, Scheme
from core.numerics.sizes import DTYPE_NAMES, Entry, entries_of

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
    """[R, G] in the dtype they are stored in; for floats None, or [R, 1]."""
    zero_point: Tensor | None
    """[R, G] int8, on the same signed range as the codes; None when symmetric or float."""
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """The weight [R, C], in the scale's dtype: compressed-tensors multiplies there, and so must we."""
        if self.scale is None:
            return self.codes
        if isinstance(self.scheme, FloatScheme):
            return self.codes.float() * self.scale.float()
        groups_RGK = self.codes.reshape(*self.scale.shape, -1).to(self.scale.dtype)
        if self.zero_point is not None:
            groups_RGK -= self.zero_point.unsqueeze(-1)
        return groups_RGK.mul_(self.scale.unsqueeze(-1)).flatten(-2)

    def stored(self) -> dict[str, Tensor]:
        """The tensors a file holds for this 2-D weight, by compressed-tensors' names.

        Zero points are packed down the rows, not along them.
        """
        if not isinstance(self.scheme, IntegerScheme):
            scales = {} if self.scale is None else {"weight_scale": self.scale}
            return {"weight": self.codes, **scales}
        assert self.scale is not None
        parts = {
            "weight_packed": pack(self.codes, self.scheme.bits),
            "weight_scale": self.scale,
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if self.zero_point is not None:
            parts["weight_zero_point"] = pack(self.zero_point.T, self.scheme.bits).T.contiguous()
        return parts

    def entries(self) -> dict[str, Entry]:
        """The same for each 2-D weight of it by formula: dtypes and shapes, without packing anything."""
        rows, columns = self.codes.shape[-2:]
        scale = "F16" if self.scale is None else DTYPE_NAMES[str(self.scale.dtype).removeprefix("torch.")]
        scales = {}
        if isinstance(self.scheme, FloatScheme) and self.scale is not None:
            scales = {"weight_scale": Entry(scale, (rows, 1))}
        return {**entries_of(rows, columns, self.scheme, scale_dtype=scale), **scales}

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that is used."""
        return (self.scheme,)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its weights in a file, header not counted."""
        return math.prod(self.codes.shape[:-2]) * sum(entry.nbytes for entry in self.entries().values())


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """A fused weight [E, R, C] whose experts are not all stored alike. Legend: ``E`` experts."""

    choices: tuple[PackedTensor, ...]
    """The whole weight in each form."""
    choice_E: tuple[int, ...]
    """Which of them each expert is stored in."""

    def dequantize(self) -> Tensor:
        """The weight [E, R, C], each expert as a reload of it gives."""
        forms = [choice.dequantize() for choice in self.choices]
        return torch.stack([forms[choice][expert] for expert, choice in enumerate(self.choice_E)])

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that is used."""
        return tuple(self.choices[choice].scheme for choice in sorted(set(self.choice_E)))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all experts in a file, header not counted."""
        n = len(self.choice_E)
        return sum(self.choices[choice].stored_bytes // n for choice in self.choice_E)


def narrow(weight_RC: Tensor, scheme: FloatScheme) -> PackedTensor:
    """Round every value to the nearest narrow float, ties to even; values must be in its range."""
    return PackedTensor(weight_RC.to(getattr(torch, scheme.dtype)), None, None, scheme)


def narrow_rows(weight_RC: Tensor, scheme: FloatScheme) -> PackedTensor:
    """The same with one float32 scale per row, by which the row's largest value becomes the format's largest."""
    limit = torch.finfo(getattr(torch, scheme.dtype)).max
    largest_R1 = weight_RC.float().abs().amax(-1, keepdim=True)
    scale_R1 = torch.where(largest_R1 > 0, largest_R1 / limit, torch.ones_like(largest_R1))
    codes_RC = (weight_RC.float() / scale_R1).clamp(-limit, limit).to(getattr(torch, scheme.dtype))
    return PackedTensor(codes_RC, scale_R1, None, scheme)
