"""One door to every format: a weight and a scheme in, its stored form out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.numerics import float8, integer, mx, nf4, nvfp4, ternary
from core.numerics.nf4 import PackedNf4
from core.numerics.packed import PackedTensor
from core.numerics.schemes import (
    FloatScheme,
    IntegerScheme,
    MxScheme,
    Nf4Scheme,
    Nvfp4Scheme,
    Scheme,
)

if TYPE_CHECKING:
    from torch import Tensor


def quantize(weight_RC: Tensor, scheme: Scheme) -> PackedTensor | PackedNf4:
    """Round a weight [.., R, C] to nearest under any scheme; a block or group size must divide its columns."""
    match scheme:
        case IntegerScheme():
            return integer.quantize(weight_RC, scheme)
        case FloatScheme():
            return float8.quantize(weight_RC, scheme)
        case MxScheme():
            return mx.quantize(weight_RC, scheme)
        case Nvfp4Scheme():
            return nvfp4.quantize(weight_RC, scheme)
        case Nf4Scheme():
            return nf4.quantize(weight_RC, scheme)
        case _:
            return ternary.quantize(weight_RC, scheme)
