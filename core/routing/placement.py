"""Experts laid out over devices: copies of the busy ones, packed so that every device has as much to do.

Legend: E experts, S slots (experts and their copies), G devices.

The greedy algorithms of DeepSeek's EPLB (github.com/deepseek-ai/EPLB, the global form): each further copy goes to the
expert whose copies are busiest; then slots, busiest first, go to the least loaded device that has room. Every device
holds the same number of slots. A copied expert's tokens are taken to be split evenly among its copies. Knows no model.
"""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core.errors import BadInput

Ints = NDArray[np.int64]


def replicas(load_E: ArrayLike, n_slots: int) -> Ints:
    """Copies of every expert, at least one each, ``n_slots`` in all: [E].

    Raises ``ValueError`` for fewer slots than experts.
    """
    load = np.asarray(load_E, dtype=np.float64)
    if n_slots < len(load):
        raise ValueError(f"{n_slots} slots hold fewer than {len(load)} experts")
    copies_E = np.ones(len(load), dtype=np.int64)
    queue = [(-each, expert) for expert, each in enumerate(load.tolist())]
    heapq.heapify(queue)
    for _ in range(n_slots - len(load)):
        _, expert = queue[0]
        copies_E[expert] += 1
        heapq.heapreplace(queue, (-load[expert] / copies_E[expert], expert))
    return copies_E


def packed(load_S: ArrayLike, n_devices: int) -> Ints:
    """The device of each slot, as many slots on each: [S]; raises ``ValueError`` where they do not divide."""
    load = np.asarray(load_S, dtype=np.float64)
    if len(load) % n_devices:
        raise ValueError(f"{len(load)} slots do not divide among {n_devices} devices")
    room = np.full(n_devices, len(load) // n_devices)
    total = np.zeros(n_devices)
    device_S = np.empty(len(load), dtype=np.int64)
    for slot in np.argsort(-load, kind="stable"):
        device = int(np.where(room > 0, total, np.inf).argmin())
        device_S[slot], total[device] = device, total[device] + load[slot]
        room[device] -= 1
    return device_S


def placement(load_E: ArrayLike, n_devices: int, n_redundant: int) -> tuple[Ints, Ints]:
    """The expert and the device of each slot: [S] twice."""
    load = np.asarray(load_E, dtype=np.float64)
    copies_E = replicas(load, len(load) + n_redundant)
    expert_S = np.repeat(np.arange(len(load)), copies_E)
    return expert_S, packed((load / copies_E)[expert_S], n_devices)


def imbalance(load_E: ArrayLike, expert_S: Ints, device_S: Ints) -> float:
    """Load of the busiest device over the mean device's; 1 is even, and so is no load at all."""
    load = np.asarray(load_E, dtype=np.float64)
    each_S = (load / np.bincount(expert_S, minlength=len(load)))[expert_S]
    total_G = np.bincount(device_S, weights=each_S)
    return float(total_G.max() / total_G.mean()) if total_G.any() else 1.0


def in_order(n_experts: int, n_devices: int) -> tuple[Ints, Ints]:
    """The plain layout, without copies: expert e on device e · G // E."""
    expert_S = np.arange(n_experts)
    return expert_S, expert_S * n_devices // n_experts


def redundant_counts(n_experts: int, n_devices: int, *, most: int) -> list[int]:
    """The numbers of copies up to ``most`` that give every device as many slots.

    Raises ``BadInput`` where there are more devices than slots could fill.
    """
    fitting = [r for r in range(most + 1) if (n_experts + r) % n_devices == 0]
    if not fitting:
        raise BadInput(
            f"{n_experts} experts and up to {most} copies never divide among {n_devices} devices; allow "
            f"{-n_experts % n_devices} copies, or take another number of devices"
        )
    return fitting
