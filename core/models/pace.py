"""How long one forward pass of an open model takes on this machine: what cost estimates are made of.

A rough, quick measurement for telling a wait beforehand; numbers that are compared come from ``core.profile``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.lazy import torch
from core.types import Prompt

if TYPE_CHECKING:
    from core.models.loaded import LoadedModel

SHORT, LONG = 16, 128
"""Tokens of the two prompts that are timed."""
PATIENCE_S = 0.5
"""A model whose short forward takes longer is not timed on the long one."""
SPEED_UP = 0.8
"""n threads are n to this power times as fast as one."""


@dataclass(frozen=True)
class Pace:
    """Seconds of one forward pass as ``fixed_s + tokens · per_token_s``, with so many threads."""

    fixed_s: float
    per_token_s: float
    threads: int

    def seconds(self, n_tokens: int) -> float:
        """One forward pass over a prompt of so many tokens."""
        return self.fixed_s + self.per_token_s * n_tokens


def measure_pace(loaded: LoadedModel) -> Pace:
    """Time forward passes over a short and a long prompt, each once warm; a ViT has its one length."""
    threads: int = torch.get_num_threads()
    if loaded.family == "vision":
        return Pace(_forward_seconds(loaded, _image(loaded)), 0.0, threads)
    longest = loaded.anatomy.context_length
    short, long = min(SHORT, longest), min(LONG, longest)
    short_s = _forward_seconds(loaded, _tokens(loaded, short))
    if short_s > PATIENCE_S or long == short:
        return Pace(0.0, short_s / short, threads)
    long_s = _forward_seconds(loaded, _tokens(loaded, long))
    per_token_s = max(long_s - short_s, 0.0) / (long - short)
    return Pace(max(short_s - per_token_s * short, 0.0), per_token_s, threads)


def n_positions(loaded: LoadedModel, prompt: Prompt) -> int:
    """How many positions a forward pass over the prompt has, special tokens included."""
    if loaded.tokenizer is None:
        return loaded.anatomy.context_length
    texts = [prompt.text] if prompt.second is None else [prompt.text, prompt.second]
    return len(loaded.tokenizer(*texts)["input_ids"])


def _forward_seconds(loaded: LoadedModel, inputs: dict[str, Any]) -> float:
    """Seconds of a warm forward pass on a machine that does nothing else: the second of two.

    On a CPU one thread's own time is taken, which other work on the machine does not lengthen, and shared out.
    """
    on_cpu, threads = loaded.device == "cpu", torch.get_num_threads()
    clock = time.thread_time if on_cpu else time.perf_counter
    if on_cpu:
        torch.set_num_threads(1)
    try:
        with loaded.lock, torch.inference_mode():
            for _ in range(2):
                started = clock()
                loaded.model(**inputs)
                if not on_cpu:
                    torch.cuda.synchronize()
                took = clock() - started
    finally:
        torch.set_num_threads(threads)
    return took / threads**SPEED_UP if on_cpu else took


def _tokens(loaded: LoadedModel, n: int) -> dict[str, Any]:
    ids = torch.arange(n, device=loaded.device).remainder(loaded.anatomy.vocab_size)
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


def _image(loaded: LoadedModel) -> dict[str, Any]:
    config = loaded.model.config
    shape = (1, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.zeros(shape, device=loaded.device, dtype=loaded.model.dtype)}
