"""A weight in the form it is stored in, and the dense values a reload of it gives.

Knows compressed-tensors' names for the parts of a weight; does not know files or models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.lazy import torch
from core.numerics.minifloat import E2M1
from core.numerics.narrow import decode, grouped, pack_codes
from core.numerics.packing import pack
from core.numerics.schemes import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    FloatScheme,
    MxScheme,
    Nvfp4Scheme,
    Scheme,
)
from core.numerics.sizes import DTYPE_NAMES, Entry, entries_of

if TYPE_CHECKING:
    from torch import Tensor

E8M0_BIAS = 127


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A weight as codes and scales, or as narrow floats.

    Legend: ``R`` leading axes, ``C`` columns, ``G`` groups of a row.
    """

    codes: Tensor
    """[R, C]: signed int8 codes of an integer grid; float8 and 16-bit floats themselves; uint8 codes of narrower floats."""
    scale: Tensor | None
    """[R, G] in the dtype they are stored in, uint8 exponents (E8M0) for MX; [.., 1, 1] for one of the whole matrix;
    [.., R / 128, C / 128] for blocks; for unscaled floats None."""
    zero_point: Tensor | None
    """[R, G] int8, on the same signed range as the codes; None when symmetric or float."""
    scheme: Scheme
    global_scale: Tensor | None = None
    """NVFP4: what the block scales were multiplied by before they were stored, [.., 1, 1] float32."""
    product_dtype: torch.dtype | None = None
    """What integer codes and scales are multiplied in; None: the scale's own. See ``core.saving.description``."""

    def dequantize(self) -> Tensor:
        """The weight [R, C], rounded as its loader rounds.

        compressed-tensors multiplies integer codes in the scale's dtype, float8 in float32, and gives packed floats in
        bfloat16, which holds every product of an MX element and its scale.
        """
        if self.scale is None:
            return self.codes
        match self.scheme:
            case FloatScheme():
                return self.codes.float() * self.spread_scale()
            case MxScheme():
                scale_RG = torch.exp2(self.scale.float() - E8M0_BIAS)
                wide = (
                    self.codes.float() if self.scheme.bits == 8 else decode(self.codes, self.scheme.minifloat)
                )
                return _times(wide, scale_RG).bfloat16()
            case Nvfp4Scheme():
                assert self.global_scale is not None
                scale_RG = self.scale.float() / self.global_scale
                return _times(decode(self.codes, E2M1), scale_RG).bfloat16()
        scale_RG = self.scale.to(self.product_dtype or self.scale.dtype)
        groups_RGK = grouped(self.codes, scale_RG.shape[-1]).to(scale_RG.dtype)
        if self.zero_point is not None:
            groups_RGK -= self.zero_point.unsqueeze(-1)
        return groups_RGK.mul_(scale_RG.unsqueeze(-1)).flatten(-2)

    def spread_scale(self) -> Tensor:
        """A float8's scale in float32, in a shape that multiplies the codes."""
        assert self.scale is not None
        scale = self.scale.float()
        if not (isinstance(self.scheme, FloatScheme) and self.scheme.scale == "block"):
            return scale
        rows, columns = self.codes.shape[-2:]
        wide = scale.repeat_interleave(BLOCK_ROWS, -2).repeat_interleave(BLOCK_COLUMNS, -1)
        return wide[..., :rows, :columns]

    def stored(self) -> dict[str, Tensor]:
        """The tensors a file holds for this 2-D weight, by compressed-tensors' names.

        Zero points are packed down the rows, not along them; one scale of a whole matrix is a vector of one.
        """
        if self.scale is None:
            return {"weight": self.codes}
        whole = getattr(self.scheme, "whole", False) or getattr(self.scheme, "scale", "") == "tensor"
        scale = {"weight_scale": self.scale.reshape(1) if whole else self.scale}
        match self.scheme:
            case FloatScheme():
                return {"weight": self.codes, **scale}
            case MxScheme():
                if self.scheme.bits == 8:
                    return {"weight": self.codes, **scale}
                return {"weight_packed": pack_codes(self.codes, self.scheme.bits), **scale}
            case Nvfp4Scheme():
                assert self.global_scale is not None
                packed = {"weight_packed": pack_codes(self.codes, 4)}
                return {**packed, **scale, "weight_global_scale": self.global_scale.reshape(1)}
        parts = {
            "weight_packed": pack(self.codes, self.scheme.bits),
            **scale,
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if self.zero_point is not None:
            parts["weight_zero_point"] = pack(self.zero_point.T, self.scheme.bits).T.contiguous()
        return parts

    def entries(self) -> dict[str, Entry]:
        """The same for each 2-D weight of it by formula: dtypes and shapes, without packing anything."""
        rows, columns = self.codes.shape[-2:]
        dtype = None if self.scale is None else DTYPE_NAMES[str(self.scale.dtype).removeprefix("torch.")]
        entries = entries_of(rows, columns, self.scheme, scale_dtype=dtype or "F16")
        if dtype is not None and "weight_scale" not in entries:  # a float8 that was given one scale a row
            entries["weight_scale"] = Entry(dtype, (rows, 1))
        return entries

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that is used."""
        return (self.scheme,)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its weights in a file, header not counted."""
        return math.prod(self.codes.shape[:-2]) * sum(entry.nbytes for entry in self.entries().values())


def _times(values_RC: Tensor, scale_RG: Tensor) -> Tensor:
    return (grouped(values_RC, scale_RG.shape[-1]) * scale_RG.unsqueeze(-1)).flatten(-2)


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
