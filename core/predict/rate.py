"""How long a step takes: bytes through the bandwidth that is reached, or multiplications through the rate that is.

The slower of the two binds (Williams, Waterman & Patterson, Roofline, CACM 52(4), 2009); calls between kernels come on
top, layer by layer. Formulas only: what share of its peaks a kind of device reaches is ``classes``' and ``anchors``'.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.predict.model import Shape


@dataclass(frozen=True)
class Pace:
    """What a device reaches."""

    bytes_per_s: float
    flops_per_s: float | None
    """None where its peak, or the share of it that is reached, is not known."""
    layer_s: float
    """Per layer, beside reading and computing."""


def decode_bytes(shape: Shape, depth: int, *, batch: int, kv_bytes: float) -> float:
    """Bytes that one decode step reads: weights, each chosen expert once, and every sequence's cache."""
    return shape.weights_read(batch) + batch * shape.kept_numbers(depth) * kv_bytes


def decode_flops(shape: Shape, depth: int, *, batch: int) -> float:
    """FLOP of one decode step; a multiply-add is two."""
    return batch * (2 * shape.active_parameters + shape.attention_flops(depth))


def step_seconds(nbytes: float, flops: float, n_layers: int, pace: Pace) -> float:
    """Seconds of any step; its multiplications count as nothing where the device's rate of them is not known."""
    compute_s = flops / pace.flops_per_s if pace.flops_per_s else 0.0
    return max(nbytes / pace.bytes_per_s, compute_s) + n_layers * pace.layer_s


def decode_seconds(shape: Shape, pace: Pace, depth: int, *, batch: int = 1, kv_bytes: float = 2) -> float:
    """Seconds of one decode step with ``depth`` tokens in the cache of each of ``batch`` sequences."""
    nbytes = decode_bytes(shape, depth, batch=batch, kv_bytes=kv_bytes)
    return step_seconds(nbytes, decode_flops(shape, depth, batch=batch), len(shape.layers), pace)


def prefill_flops(shape: Shape, prompt: int, *, batch: int = 1) -> float:
    """FLOP of a prompt: every position through the layers, the last one through the head, causal attention."""
    per_token = 2 * (shape.active_parameters - shape.head_parameters)
    return batch * (prompt * per_token + 2 * shape.head_parameters + shape.prefill_attention_flops(prompt))


def prefill_seconds(shape: Shape, pace: Pace, prompt: int, *, batch: int = 1) -> float | None:
    """Seconds to the first token of a prompt; None where the device's rate of multiplications is not known."""
    if pace.flops_per_s is None:
        return None
    flops = prefill_flops(shape, prompt, batch=batch)
    return step_seconds(shape.weights_read(batch * prompt), flops, len(shape.layers), pace)
