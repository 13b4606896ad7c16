"""Merging of experts, the slow obvious way."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np


def slow_clusters(distance_EE: np.ndarray, n_clusters: int, linkage: str) -> list[tuple[int, ...]]:
    """Join the two nearest clusters, looking at every pair of members again each time."""
    reduce = {"average": np.mean, "single": np.min}[linkage]
    clusters = [(e,) for e in range(len(distance_EE))]
    while len(clusters) > n_clusters:
        pairs = combinations(range(len(clusters)), 2)
        gaps = {
            (i, j): reduce([distance_EE[a, b] for a in clusters[i] for b in clusters[j]]) for i, j in pairs
        }
        i, j = min(gaps, key=lambda pair: gaps[pair])
        joined = tuple(sorted(clusters[i] + clusters[j]))
        clusters = [c for n, c in enumerate(clusters) if n not in (i, j)] + [joined]
    return sorted(clusters)


def slow_cheapest(cost_II: np.ndarray) -> float:
    """The smallest total cost over all orders."""
    n = len(cost_II)
    return min(sum(cost_II[i, order[i]] for i in range(n)) for order in permutations(range(n)))


def slow_groups(
    similarity_EE: np.ndarray, saliency_E: np.ndarray, n_groups: int, largest: int
) -> list[list[int]]:
    """REAM's greedy: the centroids in turn, one expert at a time."""
    order = list(np.argsort(-saliency_E, kind="stable"))
    free = set(order[n_groups:])
    groups = []
    for centroid in order[:n_groups]:
        group = [int(centroid)]
        while free and len(group) < largest:
            nearest = max(sorted(free), key=lambda e: similarity_EE[centroid, e])
            free.remove(nearest)
            group.append(int(nearest))
        groups.append(group)
    return groups


def swiglu(gate_ID: np.ndarray, up_ID: np.ndarray, down_DI: np.ndarray, x_D: np.ndarray) -> np.ndarray:
    """One expert on one token."""
    gate_I = gate_ID @ x_D
    return down_DI @ (gate_I / (1 + np.exp(-gate_I)) * (up_ID @ x_D))
