"""What a step of a model has to do, in any runtime: multiplications, weights and cache to read.

Counted from a model's shape (``core.profile.shapes``). What a step reads beside weights and cache (activations between
layers) is not counted: a few percent at most of a decode step, more of a long prompt, whose bound is multiplications.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from core.predict.model import Shape
from core.predict.rate import decode_flops, prefill_flops

Phase = Literal["prefill", "decode", "forward"]
NUMBER_BYTES = {
    "float32": 4.0,
    "f32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "f16": 2.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "u8": 1.0,
    "q8_0": 34 / 32,
    "int8": 35 / 32,
    "int4": 19 / 32,
    "int2": 11 / 32,
}
"""Bytes of a number by the name of its form, scales included (one of two bytes, one zero point, per 32 numbers)."""
HELD_AS_STORED = 0.05
"""A runtime that holds the files' bytes to this share keeps the weights as they are stored."""


@dataclass(frozen=True)
class Work:
    """What one step of a phase has to do."""

    flops: float
    weight_bytes: float
    kv_bytes: float
    weights: float = 0.0
    """Numbers behind ``weight_bytes``."""
    kv_numbers: float = 0.0
    """Numbers behind ``kv_bytes``."""
    stored_bytes: float = 0.0
    """What the files hold of those weights; less than ``weight_bytes`` where a runtime unpacked them."""
    counted: str = "as stored"

    @property
    def bytes(self) -> float:
        """Everything that must be read."""
        return self.weight_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Step:
    """A measured step of a phase, with what it had to do."""

    phase: Phase
    seconds: float
    work: Work
    dtype: str
    runtime: str
    n_layers: int


def work_of(
    shape: Shape,
    phase: Phase,
    depth: int,
    batch: int,
    *,
    kv_bytes: float = 4.0,
    held_bytes: float | None = None,
) -> Work:
    """What one step of ``phase`` has to do, in any runtime.

    ``depth`` is the prompt's length for ``prefill`` and ``forward`` (a ViT: its patches) and the tokens in the cache for
    ``decode``; ``kv_bytes`` are of one cached number. ``held_bytes`` are all weights as the runtime keeps them in memory;
    None counts them as the files store them. A decode step reads the cache, a prompt writes it.
    """
    tokens = batch if phase == "decode" else batch * depth
    flops = decode_flops if phase == "decode" else prefill_flops
    held, counted = _as_held(shape, held_bytes)
    kv_numbers = batch * shape.kept_numbers(depth) if shape.family == "decoder" else 0
    return Work(
        flops=flops(shape, depth, batch=batch),
        weight_bytes=held.weights_read(tokens),
        kv_bytes=kv_numbers * kv_bytes,
        weights=_numbers(shape).weights_read(tokens),
        kv_numbers=kv_numbers,
        stored_bytes=shape.weights_read(tokens),
        counted=counted,
    )


def _as_held(shape: Shape, held_bytes: float | None) -> tuple[Shape, str]:
    """The shape with the bytes that a runtime keeps in memory, and how they are counted."""
    if held_bytes is None:
        return shape, shape.counted if shape.counted == "share of parameters" else "as stored"
    if abs(held_bytes / shape.weight_bytes - 1) <= HELD_AS_STORED:
        return shape, "as held"
    return _numbers(shape, held_bytes / shape.parameters), "as held"


def _numbers(shape: Shape, per_number: float = 1.0) -> Shape:
    """The shape with every weight at so many bytes."""
    layers = tuple(
        replace(layer, expert_bytes=layer.expert_parameters * per_number) for layer in shape.layers
    )
    return replace(
        shape,
        weight_bytes=shape.parameters * per_number,
        read_bytes=shape.read_parameters * per_number,
        layers=layers,
    )


def work_under(seen: Mapping[str, Any], phase: Phase, shape: Shape, held_bytes: float | None) -> Work:
    """The work of a phase under the conditions of a run: batch, prompt_tokens, depth, new_tokens, dtype, kv_cache."""
    prompt = int(seen["prompt_tokens"])
    depth = shape.context_length if shape.family == "vision" else prompt
    if phase == "decode":  # the cache grows while it is measured
        depth = int(seen.get("depth", prompt)) + int(seen["new_tokens"]) // 2
    number = number_bytes(str(seen.get("kv_cache", "model")), str(seen["dtype"]))
    return work_of(shape, phase, depth, int(seen["batch"]), kv_bytes=number, held_bytes=held_bytes)


def number_bytes(kv_cache: str, dtype: str) -> float:
    """Bytes of one number of a cache of this kind; an unknown kind (``model``) keeps the dtype, an unknown dtype halves."""
    return NUMBER_BYTES.get(kv_cache, NUMBER_BYTES.get(dtype, 2.0))
