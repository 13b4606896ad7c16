"""What a model will need and reach on one device: memory, tokens per second and time to the first token, with a band.

A modelled number, never a measured one: the class's shares of the device's peaks (``classes``) through the formulas of
``rate``; where the device itself was measured with another model, scaled by what that measurement says (``anchors``). Low
and high cover nine of ten errors of the track record; no prediction goes beyond the device's own bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from core.devices.registry import Device, EngineClass
from core.errors import BadInput
from core.predict import memory, track_record
from core.predict.anchors import Anchor
from core.predict.classes import STATIC, Efficiency, efficiencies
from core.predict.memory import Need
from core.predict.model import Shape
from core.predict.rate import Pace, decode_bytes, decode_flops, decode_seconds, prefill_flops, prefill_seconds

Why = Literal["", "weights too big", "context too long"]
Bound = Literal["weights", "cache", "compute", "calls"]
SET_ASIDE = 4096
"""Positions of the cache that graphs of fixed shapes are usually compiled for (AI Hub's Genie bundles)."""


@dataclass(frozen=True)
class Workload:
    """What is asked of a model."""

    context: int = 2048
    """Tokens in the cache of each sequence, for which there must be room and at which a step is timed."""
    prompt: int = 512
    """Tokens of the prompt that the time to the first token is of; at most ``context``."""
    batch: int = 1
    kv_bytes: float = 2
    """Of a cached number; 1 with an 8-bit cache."""

    def of(self, shape: Shape) -> Workload:
        """The workload as this model can take it; raises ``BadInput`` for more context than it has."""
        if min(self.context, self.prompt, self.batch) < 1 or self.kv_bytes <= 0:
            raise BadInput("context, prompt and batch are 1 or more, and a cached number takes bytes")
        if shape.family != "decoder":  # it reads whole inputs and keeps nothing
            whole = min(self.context, shape.context_length)
            return replace(self, context=whole, prompt=whole)
        if self.context > shape.context_length:
            raise BadInput(
                f"{shape.name} reads at most {shape.context_length} tokens; ask for a context up to that"
            )
        return replace(self, prompt=min(self.prompt, self.context))


@dataclass(frozen=True)
class Band:
    """A predicted value between the ends that cover nine of ten past errors."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """One model on one device under one workload."""

    device: Device
    engine: EngineClass | None
    """What computes; None where nothing can be predicted but memory."""
    workload: Workload
    need: Need
    fits: bool
    why: Why
    """Why it does not fit: not even one token, or not so many."""
    longest_context: int
    """Tokens of each sequence that fit beside the weights; 0: the weights alone are too big."""
    decode_tokens_per_s: Band | None
    """Of all sequences together. None for a model that does not fit or decode, and where the bandwidth is not known."""
    ttft_ms: Band | None
    """Of the prompt, or of one forward pass; None where it does not fit or the rate of multiplications is not known."""
    bound: Bound | None
    """What a decode step waits for most."""
    anchor: Anchor | None
    """The measurement on this very device that the prediction is scaled by."""
    extrapolated: bool
    """Whether a step reads under half of what any published one of the class does, so that calls may cost more than told."""
    basis: str
    """What the rates rest on, as a sentence."""

    @property
    def next_step(self) -> str:
        """What would make it fit; empty where it does."""
        if self.why == "weights too big":
            left = self.device.usable_bytes - (self.need.total - self.need.weights - self.need.kv)
            share = max(0.0, left) / self.need.weights
            return f"weights must shrink to {share:.0%} of their bytes: fewer bits or a smaller model"
        if self.why == "context too long":
            return f"at most {self.longest_context} tokens of context, or fewer bits per cached number"
        return ""


def predict(
    shape: Shape,
    device: Device,
    workload: Workload | None = None,
    *,
    anchor: Anchor | None = None,
    engine: EngineClass | None = None,
) -> Prediction:
    """Predict a model on a device. ``engine``: another of the device's than the usual one. Raises ``BadInput``."""
    asked = (workload or Workload()).of(shape)
    if engine is not None and engine not in device.engines:
        raise BadInput(
            f"{device.slug} has no engine {engine!r}; it has {', '.join(device.engines) or 'none'}"
        )
    engine = engine or (anchor.engine if anchor else next(iter(device.engines), None))
    known = efficiencies().get(engine) if engine else None
    needed = memory.need(shape, asked.context, batch=asked.batch, kv_bytes=asked.kv_bytes, engine=engine)
    longest = memory.longest_context(
        shape, device.usable_bytes, batch=asked.batch, kv_bytes=asked.kv_bytes, engine=engine
    )
    fits = needed.total <= device.usable_bytes
    why: Why = "" if fits else "context too long" if longest else "weights too big"
    assumed = 1.0 if anchor and anchor.prefill else None  # the factor tells the share
    pace = known.pace(device) if known and fits else None  # what does not fit has no rate
    prompt_pace = known.pace(device, assumed=assumed) if known and fits else None
    far = known is not None and shape.weights_read(asked.batch) < known.least_bytes / 2
    return Prediction(
        device=device,
        engine=engine,
        workload=asked,
        need=needed,
        fits=fits,
        why=why,
        longest_context=longest,
        decode_tokens_per_s=_decode(shape, device, pace, asked, engine, anchor),
        ttft_ms=_ttft(shape, device, prompt_pace, asked, engine, anchor),
        bound=_bound(shape, pace, _depth(shape, asked, engine), asked),
        anchor=anchor,
        extrapolated=far,
        basis=_basis(device, engine, known, anchor, far),
    )


def _depth(shape: Shape, asked: Workload, engine: EngineClass | None) -> int:
    """Positions of the cache that a step reads: all that is set aside, where a graph's shapes are fixed."""
    return max(asked.context, min(SET_ASIDE, shape.context_length)) if engine in STATIC else asked.context


def _decode(
    shape: Shape,
    device: Device,
    pace: Pace | None,
    asked: Workload,
    engine: EngineClass | None,
    anchor: Anchor | None,
) -> Band | None:
    if shape.family != "decoder" or pace is None or engine is None or device.bandwidth is None:
        return None
    depth = _depth(shape, asked, engine)
    seconds = decode_seconds(shape, pace, depth, batch=asked.batch, kv_bytes=asked.kv_bytes)
    factor = track_record.band(engine, "decode")
    if anchor and anchor.decode:
        seconds, factor = seconds * anchor.decode, track_record.anchored_band()
    best = (
        asked.batch
        * device.bandwidth
        / decode_bytes(shape, depth, batch=asked.batch, kv_bytes=asked.kv_bytes)
    )
    value = min(asked.batch / seconds, best)
    return Band(value, value / factor, min(value * factor, best))


def _ttft(
    shape: Shape,
    device: Device,
    pace: Pace | None,
    asked: Workload,
    engine: EngineClass | None,
    anchor: Anchor | None,
) -> Band | None:
    seconds = None if pace is None else prefill_seconds(shape, pace, asked.prompt, batch=asked.batch)
    if seconds is None or engine is None or device.bandwidth is None:
        return None
    factor = track_record.band(engine, "prefill")
    if anchor and anchor.prefill:
        seconds *= anchor.prefill
    read = shape.weights_read(asked.batch * asked.prompt) / device.bandwidth
    top = device.fp16 or device.fp32
    least = max(read, prefill_flops(shape, asked.prompt, batch=asked.batch) / top) if top else read
    value = max(seconds, least)
    return Band(value * 1e3, max(value / factor, least) * 1e3, value * factor * 1e3)


def _bound(shape: Shape, pace: Pace | None, depth: int, asked: Workload) -> Bound | None:
    """The largest part of a decode step; computing counts only where it takes longer than reading."""
    if pace is None or shape.family != "decoder":
        return None
    weights_s = shape.weights_read(asked.batch) / pace.bytes_per_s
    cache_s = asked.batch * shape.kept_numbers(depth) * asked.kv_bytes / pace.bytes_per_s
    flops_s = decode_flops(shape, depth, batch=asked.batch) / pace.flops_per_s if pace.flops_per_s else 0.0
    calls_s = len(shape.layers) * pace.layer_s
    if flops_s > weights_s + cache_s:
        return "compute" if flops_s > calls_s else "calls"
    parts: dict[Bound, float] = {"weights": weights_s, "cache": cache_s, "calls": calls_s}
    return max(parts, key=lambda part: parts[part])


def _basis(
    device: Device, engine: EngineClass | None, known: Efficiency | None, anchor: Anchor | None, far: bool
) -> str:
    if device.bandwidth is None:
        return "memory only: the bandwidth is not known"
    if engine is None or known is None:
        return "memory only: no published rate is of such a device"
    rests = f"{known.n_rows} published rates of {known.n_devices} {engine} devices"
    rests += ", extrapolated: all of much larger models" if far else ""
    return f"{anchor.told}; before that {rests}" if anchor else rests
