"""One batch of patched rows on its way up through a decoder's layers; the inside of ``_replay.py``.

Legend: P prompt positions, N flat tokens of all rows, D d_model, H heads, E head_dim, T tokens of one row.

Rows with the same first position form a segment. It knows the order of flat tokens, and nothing of memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.intervene import intervene
from core.lazy import torch
from core.probes._kernel import Kernel
from core.probes._recording import Node, Recording

if TYPE_CHECKING:
    from torch import Tensor

    from core.models.loaded import LoadedModel

_LOCAL: tuple[Node, ...] = ("attention_out", "mlp_out", "z", "q")
"""Nodes that change, inside their own layer, only the positions they are patched at."""


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


class ReplayPass:
    """One batch of rows on its way up through the layers."""

    def __init__(self, loaded: LoadedModel, base: Recording, rows: Mapping[int, Row]) -> None:
        self._loaded, self._base = loaded, base
        self._rows = rows
        self._entering: dict[int, list[int]] = defaultdict(list)
        self._patches: dict[tuple[int, Node], list[tuple[int, Patch]]] = defaultdict(list)
        for number, row in rows.items():
            self._entering[entry(row)].append(number)
            for patch in row:
                self._patches[patch.layer, patch.node].append((number, patch))
        self.segments: list[_Segment] = []
        self._flat_ND: Tensor
        self._first_token: dict[int, tuple[int, int]] = {}
        """Row → (flat index of its first token, that token's position)."""
        self._keys: tuple[Tensor, Tensor] | None = None
        """Keys and values of all flat tokens, when queries are of last positions only."""
        self._stop_at_keys = False

    def enter(self, layer: int) -> None:
        """Let the rows in whose first patch is here, and write the patches of the residual stream."""
        base_PD = self._base.at("residual", layer)
        pieces: dict[tuple[int, int], list[tuple[Sequence[int], Tensor]]] = defaultdict(list)
        for old in self.segments:
            stream = old.stream
            if old.stop < self._base.n_tokens:  # it held only positions that could change: add those after
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
        spans = [torch.arange(s.start, s.stop).repeat(len(s.numbers)) for s in self.segments]
        flat_ND = self._call(layer, self._flat_ND, torch.cat(spans))
        self._cut(flat_ND, {(s.start, s.stop): list(s.numbers) for s in self.segments})

    def run_last_block(self, layer: int) -> None:
        """Run a block for the last position of each row only: the other positions give it keys and values."""
        n = self._base.n_tokens
        reaching = [s for s in self.segments if s.stop == n]
        if not reaching:
            self.segments = []
            return
        flat_ND = torch.cat([s.stream.flatten(0, 1) for s in reaching])
        self._cut(flat_ND, {(s.start, s.stop): list(s.numbers) for s in reaching})
        spans = [torch.arange(s.start, n).repeat(len(s.numbers)) for s in self.segments]
        self._stop_at_keys = True
        with suppress(_HaveKeys):
            self._call(layer, flat_ND, torch.cat(spans))
        self._stop_at_keys = False
        numbers = [number for s in self.segments for number in s.numbers]
        self._first_token = {number: (index, n - 1) for index, number in enumerate(numbers)}
        last_RD = torch.cat([s.stream[:, -1] for s in self.segments])
        last_RD = self._call(layer, last_RD, torch.full((len(numbers),), n - 1))
        self._cut(last_RD, {(n - 1, n): numbers})
        self._keys = None

    def _call(self, layer: int, flat_ND: Tensor, positions_N: Tensor) -> Tensor:
        """One of the model's blocks on flat tokens."""
        model, block = self._loaded.model, self._loaded.anatomy.blocks[layer]
        args, arguments = self._base.calls[layer]
        positions_N = positions_N.to(flat_ND.device)

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
                flat_ND[None],
                *(at_positions(value, positions_N) for value in args),
                **{name: at_positions(value, positions_N) for name, value in arguments.items()},
            )
        flat_1ND: Tensor = output if torch.is_tensor(output) else output[0]
        return flat_1ND[0]

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
            if node == "q" or self._keys is None:
                self._write(layer, node, tensor[0], head_first=True)  # type: ignore[arg-type]
        if self._stop_at_keys:
            self._keys = k, v
            raise _HaveKeys
        k, v = self._keys or (k, v)
        z_NHE = torch.empty_like(q[0].transpose(0, 1), memory_format=torch.contiguous_format)
        first = 0
        for segment in self.segments:
            n_rows = len(segment.numbers)
            n_queries = n_rows if self._keys else n_rows * (segment.stop - segment.start)
            span = slice(first, first + n_queries)
            queries = _by_row(q[0, :, span], n_rows)
            keys, values = (
                torch.cat(
                    [
                        before_PHE[: segment.start].transpose(0, 1).expand(n_rows, -1, -1, -1),
                        _by_row(own[0, :, segment.span], n_rows),
                    ],
                    2,
                )
                for before_PHE, own in (
                    (self._base.states["k"][layer], k),
                    (self._base.states["v"][layer], v),
                )
            )
            seen = self._base.masks[layer][
                :, :, segment.stop - queries.shape[2] : segment.stop, : segment.stop
            ]
            z, _ = kernel(module, queries, keys, values, seen, **arguments)
            z_NHE[span] = z.flatten(0, 1)
            first += n_queries
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
        self.segments, self._flat_ND, self._first_token = [], flat_ND, {}
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
            if number not in self._first_token:
                continue
            first, position = self._first_token[number]
            held = max(patch.start, position)
            if held < patch.stop:
                target = state[patch.head] if head_first else state
                target[first + held - position : first + patch.stop - position] = patch.value[
                    held - patch.start :
                ]


class _HaveKeys(Exception):
    """Leaves a block as soon as its keys and values are known."""


def _by_row(flat_HNE: Tensor, n_rows: int) -> Tensor:
    """[heads, rows · T, E] → [rows, heads, T, E]."""
    n_heads, _, width = flat_HNE.shape
    return flat_HNE.reshape(n_heads, n_rows, -1, width).transpose(0, 1)


def entry(row: Row) -> int:
    """The layer at which a row leaves the recorded run."""
    return min(patch.layer for patch in row)


def at_positions(value: Any, positions: Tensor) -> Any:
    """One argument of a block for the flat tokens: rotary angles and position numbers are looked up, masks dropped."""
    if isinstance(value, tuple):
        return tuple(at_positions(item, positions) for item in value)
    if not torch.is_tensor(value):
        return value
    if value.dim() == 4:
        return None  # the attention mask: the stand-in kernel takes the recorded one
    return value[positions] if value.dim() == 1 else value[:, positions]
