"""Run a decoder again from where a change enters it: only later layers, only the changed position and those after.

Legend: P prompt positions, N flat tokens of all rows, D d_model, H heads, E head_dim, T tokens of one row.

A change at layer l and position p reaches layers ≥ l at positions ≥ p and nothing else. One whole run is recorded
(residual stream, and keys and values of every layer); each row of a replay starts from it at its own layer and
position. The rows' tokens lie end to end in one sequence, [1, N, D], which the model's own blocks run on: norms,
projections, rotary positions, MLPs and experts work token by token. Only attention must know which tokens belong
together: a stand-in kernel gives each row its own keys behind the recorded ones and calls the model's kernel.
Rows that enter later join the same pass, so every layer is run once per batch. It knows no probe and no metric.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.intervene import intervene
from core.lazy import torch
from core.probes._batching import in_batches
from core.probes._kernel import Kernel, attention_by
from core.probes._recording import Node, Recording
from core.types import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

_LOCAL: tuple[Node, ...] = ("attention_out", "mlp_out", "z", "q")
"""Nodes that change, inside their own layer, only the positions they are patched at."""
TOKENS_AT_ONCE = 4096
"""Flat tokens per batch on the CPU: enough to fill its matrix kernels, small enough to stay near its caches."""


@dataclass(frozen=True)
class Patch:
    """One value to write: at a layer and node (and head), from position ``start`` on."""

    layer: int
    node: Node
    start: int
    value: Tensor
    """[positions, width]: d_model, or head_dim for z, q, k, v."""
    head: int = 0
    """Of z and q among n_heads, of k and v among n_kv_heads."""

    @property
    def stop(self) -> int:
        """One past the last patched position."""
        return self.start + len(self.value)


Row = tuple[Patch, ...]
"""Patches that are made together; all else of the row is computed anew."""
Read = Callable[[Sequence[int], int, "Tensor"], None]
"""(numbers of the rows, their first position p, final residuals before the final norm [rows, P − p, D])."""


def replay(
    loaded: LoadedModel,
    base: Recording,
    rows: Sequence[Row],
    read: Read,
    *,
    progress: Progress = silent,
) -> None:
    """Run ``base`` again once per row with the row's patches in place; hand out the final residual streams.

    Rows come to ``read`` in groups that start at the same position, in no particular order; a group may come twice
    when memory ran out in between, so ``read`` stores by row number. Numbers equal a whole forward with hooks up to
    the order of float additions. Batches are sized from free memory. Hold ``loaded.lock`` and be in inference mode;
    ``progress`` may raise ``Cancelled``.
    """
    n_layers = loaded.anatomy.n_layers
    starts = [min(patch.start for patch in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: (starts[number], _entry(rows[number])))

    def run(first: int, stop: int) -> None:
        chosen = {number: rows[number] for number in order[first:stop]}
        wave = _Pass(loaded, base, chosen)
        with attention_by(loaded, wave.attend):
            for layer in range(n_layers):
                progress(
                    first + (stop - first) * layer / n_layers, len(rows), f"replaying {len(rows)} patches"
                )
                wave.enter(layer)
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

    replay(loaded, base, rows, read, progress=progress)
    return found


@dataclass(frozen=True)
class _Segment:
    """Rows that hold the same positions, ``start`` to ``stop``, side by side."""

    start: int
    stop: int
    numbers: tuple[int, ...]
    stream: Tensor
    """[rows, T, D]"""
    offset: int
    """Of its first token among all flat tokens."""

    @property
    def span(self) -> slice:
        """Its flat tokens."""
        return slice(self.offset, self.offset + len(self.numbers) * (self.stop - self.start))


class _Pass:
    """One batch of rows on its way up through the layers."""

    def __init__(self, loaded: LoadedModel, base: Recording, rows: Mapping[int, Row]) -> None:
        self._loaded, self._base = loaded, base
        self._rows = rows
        self._entering: dict[int, list[int]] = defaultdict(list)
        self._patches: dict[tuple[int, Node], list[tuple[int, Patch]]] = defaultdict(list)
        for number, row in rows.items():
            self._entering[_entry(row)].append(number)
            for patch in row:
                self._patches[patch.layer, patch.node].append((number, patch))
        self.segments: list[_Segment] = []
        self._flat_ND: Tensor
        self._first_token: dict[int, tuple[int, int]] = {}
        """Row → (flat index of its first token, that token's position)."""

    def enter(self, layer: int) -> None:
        """Let the rows in whose first patch is here, and write the patches of the residual stream."""
        base_PD = self._base.at("residual", layer)
        pieces: dict[tuple[int, int], list[tuple[Sequence[int], Tensor]]] = defaultdict(list)
        for old in self.segments:
            stream = old.stream
            if (
                old.stop < self._base.n_tokens
            ):  # it held only the positions that could change: add those after
                after = base_PD[old.stop :].expand(len(old.numbers), -1, -1)
                stream = torch.cat([stream, after], 1)
            pieces[old.start, self._base.n_tokens].append((old.numbers, stream))
        fresh: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number in self._entering[layer]:
            fresh[self._reach(self._rows[number], layer)].append(number)
        for (start, stop), numbers in fresh.items():
            pieces[start, stop].append((numbers, base_PD[start:stop].expand(len(numbers), -1, -1)))
        if not pieces:
            return
        flat_ND = torch.cat([part.flatten(0, 1) for parts in pieces.values() for _, part in parts])
        self._cut(
            flat_ND, {key: [n for numbers, _ in parts for n in numbers] for key, parts in pieces.items()}
        )
        self._write(layer, "residual", flat_ND)

    def run_block(self, layer: int) -> None:
        """Run one block on all rows, with its patches written."""
        if not self.segments:
            return
        model, block = self._loaded.model, self._loaded.anatomy.blocks[layer]
        positions = torch.cat(
            [torch.arange(s.start, s.stop).repeat(len(s.numbers)) for s in self.segments]
        ).to(self._flat_ND.device)
        args, arguments = self._base.calls[layer]

        def change(path: str, write: Tensor) -> Tensor:
            node: Node = "attention_out" if path == block.attention_write else "mlp_out"
            new = write.clone()
            self._write(layer, node, new.view(-1, new.shape[-1]))
            return new

        changed = [
            path
            for node, path in (("attention_out", block.attention_write), ("mlp_out", block.mlp_write))
            if (layer, node) in self._patches
        ]
        with intervene(model, changed, change):
            output = model.get_submodule(block.path)(
                self._flat_ND[None],
                *(_at_positions(value, positions) for value in args),
                **{name: _at_positions(value, positions) for name, value in arguments.items()},
            )
        flat_1ND = output if torch.is_tensor(output) else output[0]
        self._cut(flat_1ND[0], {(s.start, s.stop): list(s.numbers) for s in self.segments})

    def attend(
        self,
        layer: int,
        kernel: Kernel,
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        arguments: Any,
    ) -> Tensor:
        """Attention of every row to the recorded keys before it and to its own; q, k, v are [1, heads, N, E]."""
        for node, tensor in (("q", q), ("k", k), ("v", v)):
            self._write(layer, node, tensor[0], head_first=True)  # type: ignore[arg-type]
        z_NHE = torch.empty_like(q[0].transpose(0, 1), memory_format=torch.contiguous_format)
        for segment in self.segments:
            rows, span = len(segment.numbers), segment.span
            own = [x[0, :, span].reshape(x.shape[1], rows, -1, x.shape[3]).transpose(0, 1) for x in (q, k, v)]
            keys, values = (
                torch.cat([before[: segment.start].transpose(0, 1).expand(rows, -1, -1, -1), after], 2)
                for before, after in zip(
                    (self._base.states["k"][layer], self._base.states["v"][layer]), own[1:], strict=True
                )
            )
            seen = self._base.masks[layer][:, :, segment.start : segment.stop, : segment.stop]
            z, _ = kernel(module, own[0], keys, values, seen, **arguments)
            z_NHE[span] = z.flatten(0, 1)
        self._write(layer, "z", z_NHE.transpose(0, 1), head_first=True)
        return z_NHE[None]

    def _reach(self, row: Row, layer: int) -> tuple[int, int]:
        """First position of a row, and one past the last that its own layer can change."""
        start = min(patch.start for patch in row)
        here = [patch for patch in row if patch.layer == layer]
        local = all(patch.node in _LOCAL for patch in here)
        return start, max(patch.stop for patch in here) if local else self._base.n_tokens

    def _cut(self, flat_ND: Tensor, members: Mapping[tuple[int, int], list[int]]) -> None:
        """Name the parts of a flat stream."""
        self.segments, self._flat_ND = [], flat_ND
        offset = 0
        for (start, stop), numbers in members.items():
            length = stop - start
            end = offset + len(numbers) * length
            stream = flat_ND[offset:end].view(len(numbers), length, -1)
            self.segments.append(_Segment(start, stop, tuple(numbers), stream, offset))
            for index, number in enumerate(numbers):
                self._first_token[number] = (offset + index * length, start)
            offset = end

    def _write(self, layer: int, node: Node, state: Tensor, *, head_first: bool = False) -> None:
        """Write the patches of one node into ``state``: [N, D], or [heads, N, E] with ``head_first``."""
        for number, patch in self._patches.get((layer, node), ()):
            first, position = self._first_token[number]
            span = slice(first + patch.start - position, first + patch.stop - position)
            target = state[patch.head] if head_first else state
            target[span] = patch.value


def _entry(row: Row) -> int:
    return min(patch.layer for patch in row)


def _at_positions(value: Any, positions: Tensor) -> Any:
    """One argument of a block for the flat tokens: rotary angles and position numbers are looked up, masks dropped."""
    if isinstance(value, tuple):
        return tuple(_at_positions(item, positions) for item in value)
    if not torch.is_tensor(value):
        return value
    if value.dim() == 4:
        return None  # the attention mask: the stand-in kernel takes the recorded one
    return value[positions] if value.dim() == 1 else value[:, positions]


def _bytes_per_token(loaded: LoadedModel, base: Recording) -> float:
    """Peak memory of one flat token inside a block: streams, MLP, and its row's share of keys, values and scores."""
    anatomy = loaded.anatomy
    heads = anatomy.n_heads * anatomy.head_dim
    mlp = 3 * anatomy.d_ff * max(1, anatomy.experts_per_token)
    attention = (
        6 * heads
        + 4 * heads * base.n_tokens / max(1, base.n_tokens // 2)
        + 2 * anatomy.n_heads * base.n_tokens
    )
    return float((6 * anatomy.d_model + mlp + attention) * base.at("residual", 0).element_size())
