"""A KV cache that is stored in few bits: what attention then reads is what those bits give back.

Every key and value is rounded when it is written, with one scale per 32 values of a head (or per head, for float8),
and read rounded from then on, by its own token too. Rows of bytes are kept in transformers' own cache layers, so that
windows, cropping and batching are theirs. The grids are those of ``core.numerics``; nothing is fitted to a text.

Legend: ``B`` sequences, ``H`` key/value heads, ``T`` tokens, ``C`` values of a head, ``G`` groups of them, ``Y`` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

from core.errors import CannotMeasure
from core.lazy import torch
from core.numerics.integer import quantize
from core.numerics.packing import pack, packed_words, unpack
from core.numerics.schemes import IntegerScheme

if TYPE_CHECKING:
    from torch import Tensor

KvCache = Literal["model", "fp8", "int8", "int4", "int2"]
"""What keys and values are kept in; ``model``: the dtype the model computes in."""
KV_CACHES: tuple[KvCache, ...] = get_args(KvCache)
GROUP = 32
"""Values that share a scale, where the head size allows it."""
Update = Callable[..., "tuple[Tensor, Tensor]"]
PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


def new_cache(model: Any, kind: KvCache) -> Any:
    """An empty cache for a decoder; None stands for the one the model makes itself.

    Raises ``CannotMeasure`` for a model that keeps something else than keys and values.
    """
    if kind == "model":
        return None
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        kept = type(layer).__name__
        if kept not in PLAIN_LAYERS:
            raise CannotMeasure(
                f"kv_cache={kind}: layer {index} of {type(model).__name__} keeps a {kept}, not keys and values; "
                "choose kv_cache=model"
            )
        layer.update = _through_bytes(layer.update, kind)
    return cache


def _through_bytes(update: Update, kind: KvCache) -> Update:
    """A layer's ``update`` that keeps rows of bytes and gives back what they read as."""

    def low_bit(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kept = update(to_bytes(key_states, kind), to_bytes(value_states, kind), *args, **kwargs)
        keys, values = (
            from_bytes(rows, kind, size=new.shape[-1]).to(new.dtype)
            for rows, new in zip(kept, (key_states, value_states), strict=True)
        )
        return keys, values

    return low_bit


def bytes_per_head(size: int, kind: KvCache) -> int:
    """Bytes that one key or value of a head of ``size`` values takes."""
    assert kind != "model", "a model's own cache has its own dtype"
    if kind == "fp8":
        return size + 2
    scheme = _scheme(size, kind)
    return 4 * packed_words(size, scheme.bits) + 3 * scheme.groups(size)


def to_bytes(states_BHTC: Tensor, kind: KvCache) -> Tensor:
    """Keys or values as rows of bytes [B, H, T, Y]: codes, float16 scales, and int8 zero points on integer grids."""
    if kind == "fp8":
        limit = torch.finfo(torch.float8_e4m3fn).max
        smallest = torch.finfo(torch.float16).smallest_normal
        largest_BHT1 = states_BHTC.float().abs().amax(-1, keepdim=True)
        scale_BHT1 = (largest_BHT1 / limit).clamp(min=smallest).half()
        codes_BHTC = (states_BHTC.float() / scale_BHT1.float()).clamp(-limit, limit).to(torch.float8_e4m3fn)
        return torch.cat([codes_BHTC.view(torch.uint8), scale_BHT1.view(torch.uint8)], dim=-1)
    size = states_BHTC.shape[-1]
    scheme = _scheme(size, kind)
    packed = quantize(states_BHTC, scheme, scale_dtype=torch.float16)
    assert packed.scale is not None
    assert packed.zero_point is not None
    words_BHTW = pack(packed.codes.reshape(-1, size), scheme.bits).view(*states_BHTC.shape[:-1], -1)
    parts = (words_BHTW, packed.scale, packed.zero_point)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def from_bytes(rows_BHTY: Tensor, kind: KvCache, *, size: int) -> Tensor:
    """What ``to_bytes`` kept: [B, H, T, C] float32."""
    if kind == "fp8":
        codes_BHTC, scale_BHT1 = rows_BHTY[..., :size], rows_BHTY[..., size:]
        return _as(codes_BHTC, torch.float8_e4m3fn).float() * _as(scale_BHT1, torch.float16).float()
    scheme = _scheme(size, kind)
    groups = scheme.groups(size)
    ends = 4 * packed_words(size, scheme.bits), rows_BHTY.shape[-1] - groups
    codes, scale, zero = (
        rows_BHTY[..., : ends[0]],
        rows_BHTY[..., ends[0] : ends[1]],
        rows_BHTY[..., ends[1] :],
    )
    codes_RC = unpack(_as(codes, torch.int32).reshape(-1, codes.shape[-1] // 4), scheme.bits, size)
    values_BHTGK = codes_RC.view(*rows_BHTY.shape[:-1], groups, -1).float()
    values_BHTGK -= _as(zero, torch.int8).float().unsqueeze(-1)
    return values_BHTGK.mul_(_as(scale, torch.float16).float().unsqueeze(-1)).flatten(-2)


def _scheme(size: int, kind: KvCache) -> IntegerScheme:
    return IntegerScheme(int(kind.removeprefix("int")), math.gcd(size, GROUP), symmetric=False)


def _as(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.contiguous().view(dtype)
