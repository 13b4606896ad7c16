"""NF4: sixteen quantiles of a normal distribution, scaled by the largest magnitude of each block of 64 values.

Blocks run over the matrix row by row, as in bitsandbytes; the last may be shorter. Ŵ = codebook[code] · max|block|.
With double quantization the blocks' largest magnitudes lose their mean and are stored as 8-bit codes of a "dynamic"
codebook, 256 together scaled by their largest.

Sources: QLoRA (https://arxiv.org/abs/2305.14314) and bitsandbytes' ``create_normal_map`` and ``create_dynamic_map``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from core.lazy import torch
from core.numerics.minifloat import Floats, nearest_codes
from core.numerics.schemes import Nf4Scheme, Scheme
from core.numerics.sizes import NESTED_BLOCK, Entry, entries_of

if TYPE_CHECKING:
    from torch import Tensor

CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen values of code 0 … 15."""


@dataclass(frozen=True, eq=False)
class PackedNf4:
    """A matrix as NF4 codes. Legend: ``R`` leading axes, ``C`` columns, ``N`` blocks, ``M`` runs of 256 blocks."""

    codes: Tensor
    """[R, C] uint8, 0 … 15."""
    largest_N: Tensor
    """Largest magnitude of every block: float32, or with double quantization codes of ``dynamic_codebook`` (uint8)."""
    nested_M: Tensor | None
    """Double quantization: by what each run of 256 codes is scaled, float32."""
    offset: Tensor | None
    """Double quantization: the mean that was taken off, a float32 scalar."""
    scheme: Nf4Scheme

    def scales(self) -> Tensor:
        """What each block's codes are multiplied by, [N] float32."""
        if self.nested_M is None or self.offset is None:
            return self.largest_N
        book = torch.tensor(dynamic_codebook(), dtype=torch.float32, device=self.codes.device)
        wide_N = self.nested_M.repeat_interleave(NESTED_BLOCK)[: len(self.largest_N)]
        return book[self.largest_N.int()] * wide_N + self.offset

    def dequantize(self) -> Tensor:
        """The weight [R, C], float32."""
        book = torch.tensor(CODEBOOK, dtype=torch.float32, device=self.codes.device)
        values = book[self.codes.flatten().int()]
        wide = self.scales().repeat_interleave(self.scheme.block)[: len(values)]
        return (values * wide).view(self.codes.shape)

    def entries(self) -> dict[str, Entry]:
        """What a file holds for it, by bitsandbytes' names."""
        rows, columns = math.prod(self.codes.shape[:-1]), self.codes.shape[-1]
        return entries_of(rows, columns, self.scheme)

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that is used."""
        return (self.scheme,)

    @property
    def stored_bytes(self) -> int:
        """Bytes in a file, header not counted."""
        return sum(entry.nbytes for entry in self.entries().values())


def quantize(weight_RC: Tensor, scheme: Nf4Scheme) -> PackedNf4:
    """Round a weight of any shape to the nearest of the sixteen values of its block."""
    flat = weight_RC.float().flatten()
    blocks_NK = torch.nn.functional.pad(flat, (0, -len(flat) % scheme.block)).view(-1, scheme.block)
    largest_N = blocks_NK.abs().amax(-1)
    divisor_N1 = torch.where(largest_N == 0, 1, largest_N).unsqueeze(-1)
    book = torch.tensor(CODEBOOK, dtype=torch.float32, device=flat.device)
    codes = torch.bucketize(blocks_NK / divisor_N1, (book[1:] + book[:-1]) / 2)
    codes_RC = codes.to(torch.uint8).flatten()[: len(flat)].view(weight_RC.shape)
    if not scheme.double:
        return PackedNf4(codes_RC, largest_N, None, None, scheme)
    offset = largest_N.mean()
    runs_MK = torch.nn.functional.pad(largest_N - offset, (0, -len(largest_N) % NESTED_BLOCK))
    runs_MK = runs_MK.view(-1, NESTED_BLOCK)
    nested_M = runs_MK.abs().amax(-1)
    scaled_MK = runs_MK / torch.where(nested_M == 0, 1, nested_M).unsqueeze(-1)
    dynamic = torch.tensor(dynamic_codebook(), dtype=torch.float32, device=flat.device)
    nested = torch.bucketize(scaled_MK, (dynamic[1:] + dynamic[:-1]) / 2).to(torch.uint8)
    return PackedNf4(codes_RC, nested.flatten()[: len(largest_N)], nested_M, offset, scheme)


@cache
def dynamic_codebook() -> tuple[float, ...]:
    """256 values in [-1, 1] whose decimal exponent takes the bits it needs: dense at 0, ±1 at the ends.

    For i = 0 … 6 the middles of 2^i equal parts of [0.1, 1], times 10^(i - 6), with both signs; then 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges: Floats = np.linspace(0.1, 1, 2**i + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6)
        values += [*middles, *-middles]
    return tuple(sorted(values))


def nf4_codes(values: Floats) -> np.ndarray:
    """Codes of numbers in [-1, 1], without torch."""
    return nearest_codes(values, np.array(CODEBOOK))
