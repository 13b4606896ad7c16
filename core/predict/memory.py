"""What running a model takes in memory, part by part, and the longest context that leaves room for it.

Knows no device but by the bytes it leaves to a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.devices.registry import EngineClass
from core.predict.model import Shape

CHUNK = 512
"""Positions of a prompt that runtimes of the edge pass at a time."""
ACTIVATION_BYTES = 4
"""Per number between layers: float32, as processors and llama.cpp's buffers hold it; less elsewhere."""
CUDA_BYTES = 600_000_000
"""A CUDA context with its libraries: 0.4–0.8 GB with torch."""
PROCESS_BYTES = 150_000_000
"""A runtime's own code and buffers where no context is made."""


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes while it runs."""

    weights: float
    kv: float
    activations: float
    """What is alive between two layers of one chunk of a prompt, and the logits."""
    runtime: float

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.kv + self.activations + self.runtime


def need(
    shape: Shape, context: int, *, batch: int = 1, kv_bytes: float = 2, engine: EngineClass | None = None
) -> Need:
    """Bytes with ``context`` tokens in the cache of each of ``batch`` sequences; weights as they are stored."""
    chunk = min(CHUNK, context)
    wide = max((layer.attends for layer in shape.layers), default=0)
    alive = batch * chunk * (2 * shape.d_model + 2 * max(shape.d_ff, wide))
    logits = batch * shape.vocab_size if shape.family == "decoder" else 0
    cuda = engine in ("cuda_gddr", "cuda_hbm", "jetson_gpu")
    return Need(
        weights=shape.weight_bytes,
        kv=batch * shape.kept_numbers(context) * kv_bytes if shape.family == "decoder" else 0.0,
        activations=float(ACTIVATION_BYTES * (alive + logits)),
        runtime=CUDA_BYTES if cuda else PROCESS_BYTES,
    )


def longest_context(
    shape: Shape, usable: float, *, batch: int = 1, kv_bytes: float = 2, engine: EngineClass | None = None
) -> int:
    """The most tokens whose cache leaves everything in ``usable`` bytes, at most the model's own; 0: not even one."""
    low, high = 0, shape.context_length
    while low < high:
        middle = (low + high + 1) // 2
        fits = need(shape, middle, batch=batch, kv_bytes=kv_bytes, engine=engine).total <= usable
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
