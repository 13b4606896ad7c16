"""Run a decoder again from where a change enters it: only later layers, only the changed position and those after.

Legend: P prompt positions, N flat tokens of all rows, D d_model, H heads, E head_dim, T tokens of one row.

A change at layer l and position p reaches layers ≥ l at positions ≥ p and nothing else. One whole run is recorded
(residual stream, and keys and values of every layer); each row of a replay starts from it at its own layer and
position. The rows' tokens lie end to end in one sequence, [1, N, D], which the model's own blocks run on: norms,
projections, rotary positions, MLPs and experts work token by token. Only attention must know which tokens belong
together: a stand-in kernel gives each row its own keys behind the recorded ones and calls the model's kernel.
Rows that enter later join the same pass (``_replay_pass.py``), so every layer is run once per batch. It knows no
probe and no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from core.lazy import torch
from core.probes._batching import in_batches
from core.probes._kernel import attention_by
from core.probes._recording import Recording
from core.probes._replay_pass import Patch, ReplayPass, Row, entry
from core.types import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

__all__ = ["Patch", "Row", "Read", "replay", "last_residuals"]

TOKENS_AT_ONCE = 4096
"""Flat tokens per batch on the CPU: enough to fill its matrix kernels, small enough to stay near its caches."""


Read = Callable[[Sequence[int], int, "Tensor"], None]
"""(numbers of the rows, their first position p, final residuals before the final norm [rows, P − p, D])."""


def replay(
    loaded: LoadedModel,
    base: Recording,
    rows: Sequence[Row],
    read: Read,
    *,
    only_last: bool = False,
    progress: Progress = silent,
) -> None:
    """Run ``base`` again once per row with the row's patches in place; hand out the final residual streams.

    Rows come to ``read`` in groups that start at the same position, in no particular order; a group may come twice
    when memory ran out in between, so ``read`` stores by row number. With ``only_last`` the last layer is run for the
    last position only, which is all that ``read`` then gets, and rows that cannot reach it are left out. Numbers equal a whole forward with hooks up to
    the order of float additions. Batches are sized from free memory. Hold ``loaded.lock`` and be in inference mode;
    ``progress`` may raise ``Cancelled``.
    """
    n_layers = loaded.anatomy.n_layers
    starts = [min(patch.start for patch in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: (starts[number], entry(rows[number])))

    def run(first: int, stop: int) -> None:
        chosen = {number: rows[number] for number in order[first:stop]}
        wave = ReplayPass(loaded, base, chosen)
        short = only_last and all(patch.layer < n_layers for row in chosen.values() for patch in row)
        with attention_by(loaded, wave.attend):
            for layer in range(n_layers):
                progress(first + (stop - first) * layer / n_layers, len(rows), f"replaying {len(rows)} rows")
                wave.enter(layer)
                if short and layer == n_layers - 1:
                    wave.run_last_block(layer)
                else:
                    wave.run_block(layer)
        wave.enter(n_layers)
        for segment in wave.segments:
            read(segment.numbers, segment.start, segment.stream)

    per_token = _bytes_per_token(loaded, base)
    in_batches(
        len(rows),
        run,
        bytes_each=[per_token * (base.n_tokens - starts[number]) for number in order],
        device=loaded.device,
        at_most_bytes=per_token * TOKENS_AT_ONCE if loaded.device == "cpu" else None,
    )


def last_residuals(
    loaded: LoadedModel, base: Recording, rows: Sequence[Row], *, progress: Progress = silent
) -> Tensor:
    """Final residual stream at the last position of each row, [rows, D], before the final norm."""
    found = base.at("residual", loaded.anatomy.n_layers)[-1].repeat(len(rows), 1)

    def read(numbers: Sequence[int], start: int, residual_RTD: Tensor) -> None:
        found[torch.tensor(numbers, device=found.device)] = residual_RTD[:, -1]

    replay(loaded, base, rows, read, only_last=True, progress=progress)
    return found


def _bytes_per_token(loaded: LoadedModel, base: Recording) -> float:
    """Peak memory of one flat token in a block: streams, MLP, attention scores, its share of its row's keys."""
    a = loaded.anatomy
    heads = a.n_heads * a.head_dim
    numbers = (
        6 * a.d_model + 3 * a.d_ff * max(1, a.experts_per_token) + 14 * heads + 2 * a.n_heads * base.n_tokens
    )
    return float(numbers * base.at("residual", 0).element_size())
