"""Which weights share a format, and what each takes in the file.

q, k and v read one activation and share a choice, so do gate and up, and all experts of a layer; a tied pair is one
tensor. Norms, biases, routers and position tables are in no group: they stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from core.budget.formats import Format
from core.errors import CannotCompress
from core.lazy import torch
from core.models.anatomy import Anatomy
from core.models.loaded import LoadedModel
from core.models.targets import Target, targets
from core.numerics.packed import PackedTensor
from core.numerics.schemes import IntegerScheme
from core.numerics.sizes import DTYPE_NAMES, Entry, entries_of, file_bytes
from core.quantize.grid import rounded
from core.saving.layout import file_entries

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "matrix", "experts", "fused", "table"]
"""What decides how it can be stored: a matrix is dense but no ``nn.Linear`` (GPT-2's Conv1D); fused experts are one tensor
in the file too, which nothing can pack."""


@dataclass(frozen=True)
class WeightGroup:
    """Weights that get one format together."""

    name: str
    """``3.qkv``: layer and part; outside the blocks ``embedding`` and ``head``."""
    layer: int | None
    part: str
    kind: Kind
    targets: tuple[Target, ...]


def weight_groups(loaded: LoadedModel) -> tuple[WeightGroup, ...]:
    """Every group of the model, in its own order. Raises ``CannotCompress`` where there is none."""
    found: dict[str, list[Target]] = {}
    for target in targets(loaded):
        part = part_of_block(loaded.anatomy, target)
        if part is not None:
            found.setdefault(part if target.layer is None else f"{target.layer}.{part}", []).append(target)
    if not found:
        raise CannotCompress(f"{loaded.anatomy.architecture} has no weight that could be stored otherwise")
    return tuple(
        WeightGroup(name, of[0].layer, name.rpartition(".")[2], _kind(loaded, of[0]), tuple(of))
        for name, of in found.items()
    )


def part_of_block(anatomy: Anatomy, target: Target) -> str | None:
    """The part a weight shares its format with: qkv, o, gate_up, up, down, experts …; None for what stays as it is."""
    if target.layout == "none":
        return None
    if target.module in (anatomy.embedding, anatomy.unembedding):
        return "embedding" if target.module == anatomy.embedding else "head"
    if target.layout == "embedding" or target.layer is None:
        return None
    block = anatomy.blocks[target.layer]
    if target.module in (block.o, block.down):
        return "o" if target.module == block.o else "down"
    if target.component == "attention":
        return "qkv"
    if target.component == "mlp":
        return "gate_up" if block.gate else "up"
    return str(target.component)


def _kind(loaded: LoadedModel, target: Target) -> Kind:
    if target.layout == "experts":
        return "experts" if all(len(shape) == 2 for shape in _pieces(loaded, target).values()) else "fused"
    if target.layout == "embedding":
        return "table"
    plain = type(loaded.model.get_submodule(target.module)) is torch.nn.Linear
    return "linear" if plain else "matrix"


def fits(group: WeightGroup, format_: Format, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a group can take a format at all: its rows divide, experts have no zero points, fused ones are kept."""
    if group.kind == "fused":
        return format_ is None
    if not isinstance(format_, IntegerScheme):
        return True
    if group.kind == "experts" and not format_.symmetric:
        return False
    size = format_.group_size
    return size is None or all(shapes[target.name][-1] % size == 0 for target in group.targets)


def in_format(target: Target, weight: Tensor, format_: Format) -> PackedTensor | None:
    """A weight rounded to nearest in a format; None where it is kept."""
    return None if format_ is None else rounded(target, weight, format_)


class FileSizes:
    """Bytes of groups in the file: values, scales, zero points and their lines in the header."""

    def __init__(self, loaded: LoadedModel, groups: Sequence[WeightGroup]) -> None:
        self._pieces = {target.name: _pieces(loaded, target) for group in groups for target in group.targets}
        self._kept = file_entries(loaded)
        self.fixed = file_bytes(self._kept) - sum(
            self.of(target, None) for group in groups for target in group.targets
        )
        """All that is in no group, and the header's own."""

    def of(self, target: Target, packed: PackedTensor | None) -> int:
        """Of one weight, kept or packed."""
        pieces = self._pieces[target.name]
        if packed is None:
            return sum(_with_header(name, self._kept[name]) for name in pieces)
        scale = "F16" if packed.scale is None else DTYPE_NAMES[str(packed.scale.dtype).removeprefix("torch.")]
        total = 0
        for name, shape in pieces.items():
            *lead, rows, columns = shape
            entries = entries_of(rows, columns, packed.scheme, scale_dtype=scale)
            module = name.removesuffix(".weight")
            total += sum(
                _with_header(f"{module}.{part}", Entry(entry.dtype, (*lead, *entry.shape)))
                for part, entry in entries.items()
            )
        return total


def _pieces(loaded: LoadedModel, target: Target) -> dict[str, tuple[int, ...]]:
    """The tensors that a weight becomes in the file, by name: a fused expert weight becomes many."""
    from transformers.core_model_loading import revert_weight_conversion

    empty = torch.empty_like(loaded.model.get_parameter(target.name), device="meta")
    found = revert_weight_conversion(loaded.model, {target.name: empty})
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def _with_header(name: str, entry: Entry) -> int:
    """A tensor's bytes with its line in the header, whose offsets have nine digits or nearly."""
    place = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (10**8, 10**8)}
    return entry.nbytes + len(json.dumps({name: place}, separators=(",", ":"))) - 1
