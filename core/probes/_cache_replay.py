"""A workload's requests for experts replayed through caches of every size: hits, misses, milliseconds, memory.

Legend: L MoE layers, E experts, C slots per layer, N requests of a layer, S steps (decoded tokens, or prompt chunks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from core.probes._routed_decoding import Session
from core.routing.cache import POLICIES, Floats, Ints, Policy, Requests, hit_rates, knee, slots_needed
from core.routing.traffic import Traffic

Marks = NDArray[np.bool_]
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
MAX_CAPACITIES = 33
"""Capacities shown: all of them up to 32 experts, else evenly spaced ones."""


@dataclass(frozen=True)
class Replay:
    """One layer's requests, and the fewest slots that answer each, by policy."""

    layer: int
    n_experts: int
    requests: Requests
    is_decode_S: Marks
    slots: dict[Policy, Ints]

    @classmethod
    def of(cls, sessions: list[Session], layer: int, n_experts: int, chunk: int) -> Replay:
        whole = Requests.of(np.empty((0, 1), dtype=np.int64), tokens_per_step=1)
        phases = []
        for session in sessions:
            for experts_TK, size, phase in (
                (session.prefill[layer], chunk, False),
                (session.decode[layer], 1, True),
            ):
                part = Requests.of(experts_TK, tokens_per_step=size)
                whole = whole.then(part)
                phases += [phase] * part.n_steps
        read = np.concatenate([session.prefill[layer].ravel() for session in sessions])
        hot_E = np.bincount(read[read >= 0], minlength=n_experts)
        slots = {policy: slots_needed(policy, whole.experts_N, n_experts, hot_E=hot_E) for policy in POLICIES}
        return cls(layer, n_experts, whole, np.array(phases), slots)

    def of_phase(self, phase: Phase) -> Marks:
        """[N]: which requests belong to it."""
        marked_N: Marks = self.is_decode_S[self.requests.step_N] == (phase == "decode")
        return marked_N

    def steps(self, phase: Phase, counted_N: Marks) -> Ints:
        """Marked requests in each step of a phase."""
        of_phase_S: Ints = self.requests.per_step(counted_N)[self.is_decode_S == (phase == "decode")]
        return of_phase_S

    @property
    def gap(self) -> int:
        """Misses of a cache with room for all, beyond the first request of each expert: 0 in every policy."""
        distinct = len(np.unique(self.requests.experts_N))
        return max(abs(int((found_N > self.n_experts).sum()) - distinct) for found_N in self.slots.values())


@dataclass(frozen=True)
class Machine:
    """The model's bytes and the bandwidths they pass."""

    traffic: Traffic
    context_bytes: int
    fast: float
    """Bytes per second of the memory that holds dense weights and cached experts."""
    slow: float
    """Bytes per second that missing experts come by."""

    def milliseconds(self, used_LS: Floats, missed_LS: Floats) -> Floats:
        """Time of each step."""
        return self.traffic.milliseconds(used_LS, missed_LS, fast=self.fast, slow=self.slow)

    def gigabytes(self, slots: int) -> float:
        """Memory held with so many slots per layer."""
        return float(self.traffic.memory(np.array(slots)) + self.context_bytes) / 1e9


def curves(replays: list[Replay], n_experts: int, tokens: dict[str, int], machine: Machine) -> pd.DataFrame:
    """One row per phase, policy and capacity; misses and times of all layers together."""
    capacities = np.unique(np.linspace(0, n_experts, min(n_experts + 1, MAX_CAPACITIES)).round().astype(int))
    rows = []
    for phase in PHASES:
        masks = [replay.of_phase(phase) for replay in replays]
        used_LS = np.stack(
            [replay.steps(phase, mask) for replay, mask in zip(replays, masks, strict=True)]
        ).astype(np.float64)
        for policy in POLICIES:
            for slots in capacities.tolist():
                missed_LS = np.stack(
                    [
                        replay.steps(phase, mask & (replay.slots[policy] > slots))
                        for replay, mask in zip(replays, masks, strict=True)
                    ]
                ).astype(np.float64)
                missed_S = missed_LS.sum(0)
                rows.append(
                    {
                        "phase": phase,
                        "policy": policy,
                        "slots": slots,
                        "hit_rate": float(1 - missed_LS.sum() / used_LS.sum()),
                        "misses_mean": float(missed_S.mean()),
                        "misses_p50": float(np.quantile(missed_S, 0.5)),
                        "misses_p95": float(np.quantile(missed_S, 0.95)),
                        "ms_per_token": float(machine.milliseconds(used_LS, missed_LS).sum() / tokens[phase]),
                        "memory_gb": machine.gigabytes(slots),
                    }
                )
    return pd.DataFrame(rows)


def rates(curves: pd.DataFrame, n_experts: int) -> pd.DataFrame:
    """Decode hit rates with the line that uniform routing gives."""
    decode = curves[curves["phase"] == "decode"][["policy", "slots", "hit_rate", "memory_gb"]]
    slots = decode["slots"].unique()
    uniform = pd.DataFrame({"policy": "uniform routing", "slots": slots, "hit_rate": slots / n_experts})
    return pd.concat([decode, uniform], ignore_index=True)


def knees(replays: list[Replay], policy: Policy) -> pd.DataFrame:
    """Per layer and phase, where more slots stop paying, and the hit rate there."""
    rows = []
    for replay in replays:
        for phase in PHASES:
            rates_C = hit_rates(replay.slots[policy][replay.of_phase(phase)], replay.n_experts)
            slots, above = knee(rates_C)
            rows.append(
                {
                    "layer": replay.layer,
                    "phase": phase,
                    "knee_slots": slots,
                    "hit_rate": float(rates_C[slots]),
                    "above_the_line": above,
                }
            )
    return pd.DataFrame(rows)


def by_layer(replays: list[Replay], policy: Policy) -> pd.DataFrame:
    """Decode hit rate of every layer and capacity."""
    parts = []
    for replay in replays:
        rates_C = hit_rates(replay.slots[policy][replay.of_phase("decode")], replay.n_experts)
        parts.append(
            pd.DataFrame({"layer": replay.layer, "slots": np.arange(len(rates_C)), "hit_rate": rates_C})
        )
    return pd.concat(parts, ignore_index=True)
