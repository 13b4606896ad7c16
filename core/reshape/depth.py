"""How much each block of a model matters: how far it turns the residual stream, and what the loss says without it.

Numbers only; what is dropped is decided elsewhere.

Legend: ``L`` blocks, ``B`` windows, ``P`` positions, ``D`` d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from core.capture import capture, capture_residual
from core.intervene import intervene
from core.lazy import torch
from core.models.loaded import LoadedModel
from core.types import Progress

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]


def evenly(n: int, of: int) -> tuple[int, ...]:
    """``n`` of ``of`` places in equal steps, both ends among them: round(linspace(0, of − 1, n)); one is the first."""
    return tuple(round(place * (of - 1) / (n - 1)) for place in range(n)) if n > 1 else (0,)


@contextmanager
def skipped(loaded: LoadedModel, layers: Sequence[int]) -> Iterator[None]:
    """Run the model as if these blocks were not there: each gives what it was given."""
    if not layers:
        yield
        return
    paths = [loaded.anatomy.blocks[layer].path for layer in layers]
    with (
        capture(loaded.model, paths, inputs=True) as read,
        intervene(loaded.model, paths, lambda path, _: read[path]),
    ):
        yield


def block_influence(loaded: LoadedModel, windows_BP: Tensor, progress: Progress) -> Floats:
    """1 − cos(x_l, x_{l+1}), mean over positions, per window and block, [B, L] (ShortGPT, 2403.03853).

    0: the block changes nothing but the length of the stream's vectors; 2: it turns them round.
    """
    rows = []
    for number, ids_P in enumerate(windows_BP):
        progress(number, len(windows_BP), f"block influence on window {number + 1} of {len(windows_BP)}")
        with capture_residual(loaded) as stream:
            loaded.model(input_ids=ids_P[None].to(loaded.device), use_cache=False)
        states = list(stream.values())
        rows.append([float(1 - _cosine(before, after).mean()) for before, after in pairwise(states)])
    return np.array(rows)


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)


def losses(loaded: LoadedModel, windows_BP: Tensor, without: Sequence[int]) -> Floats:
    """Mean surprisal of each window's tokens in nats, [B], with some blocks left out."""
    found = []
    with skipped(loaded, without):
        for ids_P in windows_BP.to(loaded.device):
            logits_PV = loaded.model(input_ids=ids_P[None], use_cache=False).logits[0, :-1].float()
            found.append(float(torch.nn.functional.cross_entropy(logits_PV, ids_P[1:])))
    return np.array(found)


@dataclass(frozen=True, eq=False)
class Greedy:
    """Which blocks were dropped one after another, and what each drop did to the loss."""

    order: tuple[int, ...]
    base_B: Floats
    """Loss of every window with all blocks, nats per token."""
    after_NB: Floats
    """The same after each drop."""
    first_L: Floats
    """Loss that dropping this block alone adds; NaN for one that may not go."""


def greedy(
    loaded: LoadedModel, windows_BP: Tensor, candidates: Sequence[int], count: int, progress: Progress
) -> Greedy:
    """Drop ``count`` blocks one by one, each time the one without which the loss is smallest (Shortened LLaMA)."""
    base_B = losses(loaded, windows_BP, ())
    first_L = np.full(loaded.anatomy.n_layers, np.nan)
    gone: list[int] = []
    after: list[Floats] = []
    total = sum(len(candidates) - drop for drop in range(count))
    for drop in range(count):
        tried: dict[int, Floats] = {}
        for layer in (layer for layer in candidates if layer not in gone):
            done = sum(len(candidates) - earlier for earlier in range(drop)) + len(tried)
            progress(done, total, f"drop {drop + 1} of {count}: the loss without block {layer}")
            tried[layer] = losses(loaded, windows_BP, sorted((*gone, layer)))
        if drop == 0:
            first_L[list(tried)] = [float((tried[layer] - base_B).mean()) for layer in tried]
        best = min(tried, key=lambda layer: float(tried[layer].mean()))
        gone.append(best)
        after.append(tried[best])
    return Greedy(tuple(gone), base_B, np.array(after), first_L)
