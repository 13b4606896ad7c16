"""Would a cache of experts help this workload? Replayed from the experts that it really asked for.

Legend: L MoE layers, E experts, C slots per layer, S steps (decoded tokens, or chunks of a prompt).

The replay itself is ``core/routing/cache.py``, bytes and milliseconds are ``core/routing/traffic.py``'s.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pandas as pd
from pydantic import Field

from core.lazy import torch
from core.models.fp32_path import fast_fp32
from core.probes._cache_replay import PHASES, Machine, Replay, by_layer, curves, knees, rates
from core.probes._provenance import provenance
from core.probes._routed_decoding import decode_sessions
from core.probes._routed_text import TEXTS, find_texts
from core.registry import Example, Settings, method
from core.routing.cache import POLICIES, Policy
from core.routing.discover import moe_layers
from core.routing.traffic import Traffic, cache_bytes
from core.types import Cost, Metric, Progress, Prompt, Result, View

if TYPE_CHECKING:
    from core.models.anatomy import Anatomy
    from core.models.loaded import LoadedModel


class ExpertCacheSettings(Settings):
    """The workload, and the machine it is replayed on."""

    text: str = Field("domains", description=f"Prompts of the workload: {TEXTS}; empty: the prompt alone")
    sessions: int = Field(8, ge=1, le=64, description="Prompts read and written on, one after the other")
    prompt_tokens: int = Field(64, ge=1, le=2048, description="Tokens of each prompt, from its beginning")
    new_tokens: int = Field(64, ge=1, le=1024, description="Tokens written after each prompt")
    chunk: int = Field(512, ge=1, le=4096, description="Prompt tokens that pass the experts together")
    policy: Policy = Field(
        "lru", description="Policy of the layer map and the headline; all are in the curves"
    )
    target: float = Field(0.9, gt=0, le=1, description="Share of decode requests that the headline asks for")
    weight_bits: float = Field(16, ge=1, le=32, description="Bits per weight of the model as deployed")
    fast_gb_per_s: float = Field(
        20, gt=0, le=10_000, description="Bandwidth of the memory that holds the cache, GB/s"
    )
    slow_gb_per_s: float = Field(
        2, gt=0, le=10_000, description="Bandwidth that missing experts come by, GB/s"
    )


def _cost(anatomy: Anatomy, n_tokens: int, settings: ExpertCacheSettings) -> Cost:
    """A pass over each prompt, one per written token (each about a short prompt's), and the traces."""
    sessions = settings.sessions if settings.text.strip() else 1
    length = settings.prompt_tokens if settings.text.strip() else n_tokens
    forwards = sessions * (length / max(1, n_tokens) + settings.new_tokens)
    layers = sum(block.is_moe for block in anatomy.blocks)
    tokens = sessions * (length + settings.new_tokens)
    return Cost(forwards, 8 * layers * tokens * anatomy.experts_per_token * (2 + len(POLICIES)))


@method(
    "probe",
    title="Expert cache",
    needs=["decoder", "text", "moe"],
    paper="https://arxiv.org/abs/2505.16056",
    answers="What if it routed otherwise?",
    examples=(
        Example("Text of every domain in turn", Prompt("(the text is read instead)")),
        Example("Python all day", Prompt("(the text is read instead)"), {"text": "domain:python"}),
    ),
    cost=_cost,
)
def expert_cache(
    loaded: LoadedModel, prompt: Prompt, progress: Progress, settings: ExpertCacheSettings
) -> Result:
    """Replay a cache of C experts per layer on what this workload asked for, and predict its speed.

    Prompts are read and written on greedily, one after the other; the caches of all layers stay warm. A step asks once
    for each expert it needs: decoding for those of one token, prefill for all that a chunk of the prompt chose. Hit
    rate is answered requests / requests, the first of each expert included. LRU and LFU need no foresight; static pins
    the experts that the prompts used most; Belady knows the future and is the most any policy can reach. A uniform
    router hits C/E under LRU: only what is above that line is locality.

    Time of a step = (dense bytes + Σ used · expert bytes) / fast + Σ missed · expert bytes / slow bandwidth; memory =
    weights held + C experts per layer + keys and values. Both are bounds from bytes alone: no arithmetic, no overlap,
    no prefetching.
    """
    started = time.perf_counter()
    layers = moe_layers(loaded)
    texts = find_texts(loaded, prompt, settings.text)
    with loaded.lock, torch.inference_mode(), fast_fp32(n_experts=loaded.anatomy.n_experts) as path:
        sessions = decode_sessions(
            loaded,
            texts,
            progress,
            sessions=settings.sessions,
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
        )
    counts = {layer.layer: layer.n_experts for layer in layers}
    replays = [Replay.of(sessions, layer, n, settings.chunk) for layer, n in counts.items()]
    n_experts = max(counts.values())
    tokens = {
        "prefill": sum(len(next(iter(one.prefill.values()))) for one in sessions),
        "decode": sum(len(next(iter(one.decode.values()))) for one in sessions),
    }
    context = max(
        len(next(iter(one.prefill.values()))) + len(next(iter(one.decode.values()))) for one in sessions
    )
    machine = Machine(
        Traffic.of(loaded, bits=settings.weight_bits),
        cache_bytes(loaded, context),
        fast=1e9 * settings.fast_gb_per_s,
        slow=1e9 * settings.slow_gb_per_s,
    )
    found = curves(replays, n_experts, tokens, machine)
    return Result(
        frames={
            "main": found,
            "rates": rates(found, n_experts),
            **{phase: found[found["phase"] == phase].reset_index(drop=True) for phase in PHASES},
            "knees": knees(replays, settings.policy),
            "layers": by_layer(replays, settings.policy),
        },
        views=_views(settings.policy),
        metrics=_metrics(found, settings, tokens["decode"], n_experts),
        provenance=provenance(
            loaded,
            prompt,
            method="expert_cache",
            settings=settings,
            started=started,
            conditions={
                "text": texts.name,
                "text_fingerprint": texts.fingerprint,
                "sessions": len(sessions),
                "prompt_tokens": tokens["prefill"],
                "written_tokens": tokens["decode"],
                "fp32_path": path.name,
            },
            exactness_gap=float(max(replay.gap for replay in replays)),
            exactness_check="requests beyond each expert's first that caches of all experts would miss, any policy",
        ),
        notes=(
            f"{len(sessions)} prompts of {texts.name}: {tokens['prefill']} tokens read, {tokens['decode']} written.",
            (
                f"Predicted at {settings.weight_bits:g} bits per weight, {settings.fast_gb_per_s:g} GB/s for what is held "
                f"and {settings.slow_gb_per_s:g} GB/s for what is missing; not measured here."
            ),
            "Static is set up by the prompts' own use of experts, which it would know only after reading them.",
        ),
    )


def _metrics(
    curves: pd.DataFrame, settings: ExpertCacheSettings, n: int, n_experts: int
) -> tuple[Metric, ...]:
    """The smallest cache that reaches the target, and what it saves."""
    mine = curves[(curves["phase"] == "decode") & (curves["policy"] == settings.policy)]
    whole = mine[mine["slots"] == n_experts].iloc[0]
    found = [Metric("ms_per_token_all_held", float(whole["ms_per_token"]), "ms", "lower", n)]
    enough = mine[mine["hit_rate"] >= settings.target]
    if len(enough):
        first = enough.iloc[0]
        found += [
            Metric("slots_for_target", float(first["slots"]), "experts per layer", "lower", n),
            Metric("memory_gb", float(first["memory_gb"]), "GB", "lower"),
            Metric("ms_per_token", float(first["ms_per_token"]), "ms", "lower", n),
            Metric("misses_p95", float(first["misses_p95"]), "experts per token", "lower", n),
        ]
    return tuple(found)


def _views(policy: Policy) -> tuple[View, ...]:
    misses = ("misses_mean", "misses_p50", "misses_p95")
    return (
        View(
            "line",
            x="slots",
            y="hit_rate",
            color="policy",
            frame="rates",
            title="Decoding: requests answered by so many slots per layer",
            unit="share",
            tooltip=("memory_gb",),
        ),
        *(
            View(
                "line",
                x="memory_gb",
                y="ms_per_token",
                color="policy",
                frame=phase,
                title=f"{phase.capitalize()}: predicted time per token against memory",
                unit="ms",
                tooltip=("slots", "hit_rate", *misses),
            )
            for phase in reversed(PHASES)
        ),
        View(
            "line",
            x="slots",
            y="misses_p95",
            color="policy",
            frame="decode",
            title="Decoding: experts missing in the worst twentieth of tokens",
            unit="experts per token",
            tooltip=misses,
        ),
        View(
            "table",
            x="slots",
            y="hit_rate",
            text="policy",
            title="All replays; misses are per decoded token, or per chunk of a prompt",
            tooltip=("phase", *misses, "ms_per_token", "memory_gb"),
        ),
        View(
            "heatmap",
            x="slots",
            y="layer",
            color="hit_rate",
            frame="layers",
            title=f"Decoding: hit rate of each layer under {policy}",
            unit="share",
        ),
        View(
            "table",
            x="layer",
            y="knee_slots",
            frame="knees",
            title=f"Where more slots stop paying, under {policy}",
            tooltip=("phase", "hit_rate", "above_the_line"),
        ),
    )
